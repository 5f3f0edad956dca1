"""Run a command in a process group of its own for a limited time: neither a crash nor a hang of it ends the caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.record import ROOT


@dataclass(frozen=True)
class Finished:
    """status: the exit status, negative for a signal; None where the time ran out and the group was killed."""

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def problem(self) -> str:
        """Why it failed, in one line."""
        if self.status is None:
            return f"took longer than {self.seconds:.0f} s"
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        tail = f": {lines[-1][:300]}" if lines else ""
        return (f"killed by signal {-self.status}" if self.status < 0 else f"exit status {self.status}") + tail


def run_limited(command: Sequence[str], seconds: float, tick: Callable[[], None] | None = None) -> Finished:
    """Run `command` from the repository's root and kill it, with the processes it started, after `seconds`.

    tick: called about once a second while it runs.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while True:
            left = start + seconds - time.monotonic()
            try:
                out, err = process.communicate(timeout=max(min(left, 1.0), 0.01))
                status: int | None = process.returncode
                break
            except subprocess.TimeoutExpired:
                if left <= 0:
                    status = None
                    out, err = _kill(process)
                    break
                if tick:
                    tick()
    except BaseException:
        _kill(process)
        raise
    return Finished(status, out, err, time.monotonic() - start)


def _kill(process: subprocess.Popen[str]) -> tuple[str, str]:
    os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()


def last_json(out: str) -> dict[str, Any] | None:
    """The last line of a worker's output as an object, or None."""
    lines = out.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
