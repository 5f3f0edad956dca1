"""Work that may ruin its process, done in one of its own: a stray address or a failed capture leaves no CUDA behind.

A module with `work(job) -> Iterator[dict]` is run as `python -m deitfast.verification.process MODULE`; it takes the job
and gives its answers as lines of JSON.
"""

from __future__ import annotations

import importlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

PATIENCE_S = 300.0
"""Seconds to wait for one answer: kernels may have to be compiled for it."""


class ProcessEnded(Exception):
    """The process ended, or was silent for too long, before it was done."""


def answers(module: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of `module`'s work in a process of its own, as they come. Raises ProcessEnded."""
    command = [sys.executable, "-m", "deitfast.verification.process", module]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdin is not None
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError):  # it has ended, and how is told below
                child.stdin.write(json.dumps(job) + "\n")
                child.stdin.close()
            while (line := lines.get(timeout=PATIENCE_S)) is not None:
                yield json.loads(line)
            if child.wait() != 0:
                errors.seek(0)
                raise ProcessEnded(_reason(child.returncode, errors.read()))
        except queue.Empty:
            raise ProcessEnded(f"no answer in {PATIENCE_S:.0f} s") from None
        finally:
            child.kill()
            child.wait()
            reader.join()


_tells = False


def tell(answer: dict[str, Any]) -> None:
    """An answer in the midst of the work, where it is done in a process of its own; nobody hears it elsewhere."""
    if _tells:
        print(json.dumps(answer), flush=True)


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):  # libraries print too
            lines.put(line)
    lines.put(None)


def _reason(status: int, errors: str) -> str:
    last = errors.strip().splitlines()[-1:] or [""]
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"its process ended with {how}{': ' if last[0] else ''}{last[0][:200]}"


def main() -> None:
    global _tells
    _tells = True
    for answer in importlib.import_module(sys.argv[1]).work(json.loads(sys.stdin.readline())):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    from deitfast.verification import process  # the module that the work imports, not this copy of it

    process.main()
