"""A watch over the steps: who is being waited for, and an end to a process that makes no more progress.

A process whose partner hangs sits in a collective without a word, for as long as the backend's patience: ten minutes
with NCCL, for ever in a captured graph. A thread of each process tells the board how far it is; that of the leading
process says whom all wait for; and a process that made no step for too long ends, so that the launcher starts the run
again from its newest checkpoint.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from deitfast.board import Board
from deitfast.guard import leave_now

T = TypeVar("T")
TELL_AFTER_S = 60.0
_PERIOD_S = 5.0
_SLOWEST_TIMES = 10
_FOR_A_SAVE = 6  # a disk may be slow
SAVE = "a save"
EXIT_HANGING = 1


class Watch:
    """Watches this process from its first step until `close`.

    patience: seconds without a step, or other sign of life, after which the process ends where a launcher would start
    it again (`restarts`); ten times the slowest step so far where that is longer; without limit before the first step.
    say: gets a line where all wait for a process. fault: gets kind, step and words of that, and of the end.
    """

    def __init__(
        self, board: Board | None, rank: int, size: int, step: int, *, patience: float, restarts: bool,
        say: Callable[[str], None], fault: Callable[[str, int, str], None], tell_after: float = TELL_AFTER_S,
        leave: Callable[[int], None] = leave_now,
    ) -> None:  # fmt: skip
        self.board = board.another() if board else None
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
        if self.doing == "a step":  # neither the first one nor a pause
            self._slowest = max(self._slowest or 0.0, now - self._alive)
        self.step, self.doing, self._alive = step, "a step", now
        if self._slowest is None:
            self._slowest = 0.0

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
                    self.board.post(f"beat/{self.rank}", f"{time.time():.0f} {self.step} {self.doing}")
            if silent < self.tell_after:
                self._told = 0.0
            elif self.rank == 0 and silent > 2 * self._told:
                self._told = max(silent, self.tell_after)
                what = f"no step for {silent:.0f} s after step {self.step}: {self._waiting_for()}"
                self.say(what)
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
        with suppress(ValueError, OSError):  # where stderr is no file
            faulthandler.dump_traceback()
        self.leave(EXIT_HANGING)

    def _waiting_for(self) -> str:
        """Which processes hold the others up, by what each has last posted."""
        own = f"process 0 is in {self.doing}"
        if not self.board:
            return own
        beats: dict[int, tuple[float, int, str]] = {}
        with suppress(RuntimeError):
            for rank in range(1, self.size):
                when, done, doing = (self.board.read(f"beat/{rank}") or "0 0 the start").split(" ", 2)
                beats[rank] = (time.time() - float(when), int(done), doing)
        silent = [r for r, (age, _, _) in beats.items() if age > 4 * _PERIOD_S]
        behind = [r for r, (_, step, _) in beats.items() if step < self.step]
        apart = [r for r, (_, _, doing) in beats.items() if doing != self.doing]
        late = silent or behind or apart
        if not late:
            return own
        age, step, theirs = beats[late[0]]
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        heard = f"last heard of {age:.0f} s ago" if silent else f"in {theirs}"
        return f"waiting for process {late[0]}{more} (step {step}, {heard}); {own}"
