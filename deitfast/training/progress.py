"""progress.json: how far a run got, on disk after every step, for the next start of a run that died without a word."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from deitfast.files import read_json

_BYTES = 128


@dataclass(frozen=True)
class Reached:
    """step: steps done. saved: step of the newest checkpoint, None before the first. running: no end was noted."""

    step: int = 0
    saved: int | None = None
    running: bool = False


class Progress:
    """The file, overwritten in place: a few microseconds a step, and no new block on a disk that is full.

    A process that dies leaves what it wrote; only a machine that dies may lose the last seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1

    def read(self) -> Reached | None:
        """What the last start left; None where there is nothing readable."""
        found = read_json(self.path)
        step, saved, running = (found.get(name) for name in ("step", "saved", "running"))
        if type(step) is int and (saved is None or type(saved) is int) and type(running) is bool:
            return Reached(step, saved, running)
        return None

    def write(self, reached: Reached) -> None:
        line = json.dumps(asdict(reached))
        with contextlib.suppress(OSError):
            if self._descriptor < 0:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._descriptor, f"{line:<{_BYTES - 1}}\n".encode(), 0)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
