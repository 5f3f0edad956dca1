"""Run a command in a process group of its own for a limited time: neither a crash nor a hang of it ends the caller."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.reporting.record import ROOT


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


def run_limited(command: Sequence[str], seconds: float, tick: Callable[[str], None] | None = None) -> Finished:
    """Run `command` from the repository's root and kill it, with the processes it started, after `seconds`.

    tick: called about once a second while it runs, with what it has printed so far.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        with open(out, "w") as to_out, open(err, "w") as to_err:
            process = subprocess.Popen(command, cwd=ROOT, stdout=to_out, stderr=to_err, start_new_session=True)
        try:
            status = None
            while status is None and (left := start + seconds - time.monotonic()) > 0:
                try:
                    status = process.wait(min(left, 1.0))
                except subprocess.TimeoutExpired:
                    if tick:
                        tick(out.read_text(errors="replace"))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        printed, complained = (path.read_text(errors="replace") for path in (out, err))
    return Finished(status, printed, complained, time.monotonic() - start)


def last_json(out: str) -> dict[str, Any] | None:
    """The last line of a worker's output as an object, or None."""
    lines = out.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
