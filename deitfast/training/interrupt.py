"""Signals that ask a run to stop, and how all its processes agree on the step after which they do.

SIGTERM (a scheduler takes the machine away), SIGINT (Ctrl-C), SIGUSR1 (SLURM's warning) and SIGHUP (a terminal closes)
mean the same: save, end with exit code 75, be resumed. One that comes before the first step ends the process at once,
there being nothing to save; a second one, a second or more after the first, does so until all is saved.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from deitfast.distributed import posted
from deitfast.errors import EXIT_INTERRUPTED
from deitfast.guard import leave_now

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SAME_S = 1.0  # a launcher and a terminal may both pass on one key press
_ENDING_S = 10.0
_CHECK_S = 0.5
_MOST_STEPS = 32
_PATIENCE = timedelta(minutes=30)
_KEPT = 1000  # decisions that a process which lags behind may still read
_WANTED = "stop/wanted"


class StopRequest:
    """While entered, a signal's name comes to lie in `received`.

    The interpreter runs a handler only between two instructions of the main thread, which may sit in a collective for
    minutes; a thread of its own hears of the signal at once. `begin` says that there is something to save from now on.
    A signal that is ignored (nohup) stays so. Without effect outside the main thread.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._begun = False

    def __enter__(self) -> StopRequest:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def begin(self) -> None:
        """From now on a signal is a request, which the loop will see."""
        self._begun = True

    def end(self) -> None:
        """All is saved: what comes now, as of a launcher whose first process has ended, is no second signal."""
        self._since = time.monotonic() + _ENDING_S

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before_fd)
        self._writer.close()  # ends the thread
        self._before = {}

    def _listen(self) -> None:
        while data := self._reader.recv(64):
            for number in data:
                if number in SIGNALS:
                    self._note(signal.Signals(number))
        self._reader.close()

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._since = number.name, now
            if not self._begun:
                _last_words(f"{number.name} before the first step: nothing to save")
                leave_now(EXIT_INTERRUPTED)  # not final: it may be the launcher's, after another process died
        elif now - self._since > _SAME_S:
            _last_words(f"a second signal ({number.name}): ending at once, nothing more is saved")
            leave_now(128 + number, final=True)


class Agreement:
    """Whether all processes stop after a step: the same answer everywhere, without a collective or a device.

    At steps that the leading process sets, about two a second, it posts its decision on the board, and each other
    process reads it before it goes on. A process that got a signal posts that first; the leading one decides by it at
    the next of these steps. So no process is ahead of another that has stopped.
    """

    def __init__(self, stop: StopRequest, board: Store | None, rank: int, step: int) -> None:
        self.stop, self.board, self.is_main = stop, board, rank == 0
        self._checked, self._next, self._number = step, step, 0
        self._then = time.monotonic()

    def decided(self, step: int) -> str | None:
        """The signal's name where all stop now, after `step`; to be called after every step."""
        if self.board is None:
            return self.stop.received
        if step < self._next:
            return None
        self.announce()
        if self.is_main:
            self._decide(step)
        self.board.wait([f"stop/{self._number}"], _PATIENCE)
        steps, _, name = self.board.get(f"stop/{self._number}").decode().partition(" ")
        self._next, self._number = step + int(steps), self._number + 1
        return name or None

    def _decide(self, step: int) -> None:
        """Post the steps until the next decision, and the signal's name."""
        assert self.board
        now = time.monotonic()
        seconds_a_step = max(now - self._then, 1e-6) / max(step - self._checked, 1)
        steps = max(1, min(int(_CHECK_S / seconds_a_step), _MOST_STEPS))
        self.board.set(f"stop/{self._number}", f"{steps} {self.wanted() or ''}")
        if self._number >= _KEPT:
            self.board.delete_key(f"stop/{self._number - _KEPT}")
        self._checked, self._then = step, now

    def announce(self) -> None:
        """Tell the others of a signal that this process got."""
        if self.board is not None and self.stop.received:
            self.board.set(_WANTED, self.stop.received)

    def wanted(self) -> str | None:
        """The signal that some process got, as far as this one knows: no agreement yet."""
        self.announce()
        return self.stop.received or posted(self.board, _WANTED)


def _last_words(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
