"""SIGTERM, which a scheduler sends before it takes the machine away, becomes a request to save and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop, saved, and can be resumed: EX_TEMPFAIL of sysexits.h."""


class StopRequest:
    """While entered, SIGTERM sets `received` instead of ending the process."""

    received = False

    def __enter__(self) -> StopRequest:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = True
