"""What every command starts with: its options, its device, products that mean what they say; and commands of its own.

A command that may crash or hang runs in a process group of its own for a limited time, and its caller lives on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.record import ROOT
from deitfast.compiler import check_compiler
from deitfast.errors import DeitfastError


def arguments(parser: argparse.ArgumentParser, minutes: float = 8.0) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that everything runs, not how fast")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results as JSON, rewritten after every row")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"wall time (default {minutes:g})")


def ready(program: str, device: str) -> bool:
    """Whether the device and what its kernels need is there; says so where it is not. fp32 is fp32 from here on."""
    fp32_is_fp32()
    if device == "cuda" and not torch.cuda.is_available():
        print(f"{program}: no CUDA device; --device cpu --quick rehearses on CPU", file=sys.stderr)
        return False
    try:
        if device == "cuda":
            check_compiler()
    except DeitfastError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return False
    return True


def fp32_is_fp32() -> None:
    """No TF32 in this process: by default cuDNN rounds the operands of fp32 convolutions to 10 bits, the patch
    embedding's among them, and what is compared with eager fp32 would be compared with that."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


# Processes -----------------------------------------------------------------------------------------------------------


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
