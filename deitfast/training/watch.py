"""A watch over the steps: who is being waited for, and an end to a process that makes no more progress.

A process whose partner hangs sits in a collective without a word, for as long as the backend's patience: ten minutes
with NCCL, for ever in a captured graph. A thread of each process tells the board how far it is; that of the leading
process says whom all wait for; and a process that made no step for too long ends, so that the launcher starts the run
again from its newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from torch.distributed import Store

from deitfast.distributed import posted
from deitfast.guard import leave_now

T = TypeVar("T")
TELL_AFTER_S = 60.0
_PERIOD_S = 5.0
_SLOWEST_TIMES = 10
_UNUSUAL = 3  # times the slowest step so far
_FOR_A_SAVE = 6  # a disk may be slow
SAVE = "a save"
_SILENT_S = 2 * _PERIOD_S
_PLACE = f"{os.getpid()}@{socket.gethostname()}"
EXIT_HANGING = 1


class Watch:
    """Watches this process from its first step until `close`.

    patience: seconds without a step, or other sign of life, after which the process ends where a launcher would start
    it again (`restarts`); ten times the slowest step so far where that is longer; without limit before the first step.
    say: gets a line where a step takes a minute and three times the slowest so far: whom all wait for. fault: gets
    kind, step and words of that, where there are others, and of the end.
    """

    def __init__(
        self, board: Store | None, rank: int, size: int, step: int, *, patience: float, restarts: bool,
        say: Callable[[str], None], fault: Callable[[str, int, str], None], tell_after: float = TELL_AFTER_S,
        leave: Callable[[int], None] = leave_now,
    ) -> None:  # fmt: skip
        self.board = board.clone() if board else None  # type: ignore[attr-defined]  # torch's stubs lack it
        self.rank, self.size, self.patience, self.restarts = rank, size, patience, restarts
        self.say, self.fault, self.tell_after, self.leave = say, fault, tell_after, leave
        self.step, self.doing = step, "the first step"
        self._slowest: float | None = None
        self._alive = time.monotonic()
        self._told = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stepped(self, step: int) -> None:
        """After every step."""
        now = time.monotonic()
        # The first step says nothing of the others.
        self._slowest = 0.0 if self._slowest is None else max(self._slowest, now - self._alive)
        self.step, self.doing, self._alive = step, "a step", now

    def alive(self) -> None:
        """A sign of life between two steps, such as a batch of an evaluation."""
        self._alive = time.monotonic()

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Names what this process does instead of a step ("an evaluation")."""
        self.doing = doing
        self.alive()
        try:
            yield
        finally:
            self.doing = "a pause"
            self.alive()

    def fed(self, batches: Iterator[T]) -> Iterator[T]:
        """`batches`, with the wait for each of them named."""
        while True:
            before, self.doing = self.doing, "a wait for data"
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.doing = before
            yield batch

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=_PERIOD_S)

    def _run(self) -> None:
        period = min(_PERIOD_S, self.tell_after / 4, self.patience / 4)
        while not self._closed.wait(period):
            silent = time.monotonic() - self._alive
            if self.board:
                with suppress(RuntimeError):  # the store went with the leading process
                    self.board.set(f"beat/{self.rank}", f"{time.time():.0f} {self.step} {_PLACE} {self.doing}")
            if silent < max(self.tell_after, _UNUSUAL * (self._slowest or 0.0)):
                self._told = 0.0
            elif self.rank == 0 and silent > 2 * self._told:
                self._told = max(silent, self.tell_after)
                what = f"no step for {silent:.0f} s after step {self.step}: {self._waiting_for()}"
                self.say(what)
                if self.size > 1:  # one that is alone waits for nobody
                    self.fault("waiting", self.step, what)
            if self.restarts and self._slowest is not None and silent > self._limit():
                self._end(silent)
                return

    def _limit(self) -> float:
        limit = max(self.patience, _SLOWEST_TIMES * (self._slowest or 0.0))
        return limit * (_FOR_A_SAVE if self.doing == SAVE else 1)

    def _end(self, silent: float) -> None:
        what = f"no step for {silent:.0f} s after step {self.step}, in {self.doing}"
        self.fault("hang", self.step, what)
        sys.stderr.write(f"process {self.rank}: {what}; it ends, so that the run starts again from its checkpoint\n")
        self._kill_the_silent()
        with suppress(ValueError, OSError):  # where stderr is no file
            faulthandler.dump_traceback()
        self.leave(EXIT_HANGING)

    def _beats(self) -> dict[int, _Beat]:
        """What the other processes have last posted."""
        beats = {}
        with suppress(RuntimeError):
            for rank in range(self.size):
                if rank != self.rank and (text := posted(self.board, f"beat/{rank}")):
                    when, step, place, doing = text.split(" ", 3)
                    beats[rank] = _Beat(time.time() - float(when), int(step), place, doing)
        return beats

    def _waiting_for(self) -> str:
        """Which processes hold the others up."""
        own, beats = f"process {self.rank} is in {self.doing}", self._beats()
        silent = [rank for rank, beat in beats.items() if beat.age > _SILENT_S]
        behind = [rank for rank, beat in beats.items() if beat.step < self.step]
        late = silent or behind or [rank for rank, beat in beats.items() if beat.doing != self.doing]
        if not late:
            return own
        beat = beats[late[0]]
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        heard = f"last heard of {beat.age:.0f} s ago" if silent else f"in {beat.doing}"
        return f"waiting for process {late[0]}{more} (step {beat.step}, {heard}); {own}"

    def _kill_the_silent(self) -> None:
        """End the processes of this machine that do not even beat: the launcher would wait 30 s for each to listen."""
        pid, host = _PLACE.split("@", 1)
        for beat in self._beats().values():
            theirs, where = beat.place.split("@", 1)
            if beat.age > _SILENT_S and where == host and theirs != pid:
                with suppress(OSError):
                    os.kill(int(theirs), signal.SIGKILL)


@dataclass(frozen=True)
class _Beat:
    age: float  # seconds
    step: int
    place: str  # pid@host
    doing: str
