"""faults.jsonl: what went wrong in a run, one JSON object a line, of all its processes and all its starts.

Each has `time`, `kind`, `step`, `process` and what else is known. Kinds: `crash` (a start that ended without a word;
told by the next one), `error` (an exception, with its text), `hang`, `waiting`, `failed save`, `damaged checkpoint`,
`roll-back`, `skipped steps`, `bad files`, `tracker`, `refused` (a start after three crashes at one step).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from deitfast.errors import HopelessError
from deitfast.files import read_json_lines

CRASHES_TO_REFUSE = 3
_SHOWN_ELSEWHERE = ("skipped steps", "bad files", "error")  # in the progress line, or with the crash that follows


class FaultLog:
    """The faults of one run. Every process appends; a disk that is full or gone is no further fault."""

    def __init__(self, path: Path, process: int = 0) -> None:
        """process: rank of the one that appends."""
        self.path, self.process = path, process
        self._size, self._summary = 0, ""

    def add(self, kind: str, step: int, what: str = "", **facts: Any) -> None:
        entry = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "kind": kind, "step": step, "process": self.process}
        entry |= {"what": what, **facts} if what else facts
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(entry).encode() + b"\n")  # one write: lines of several processes do not mix

    def entries(self) -> list[dict[str, Any]]:
        """All faults so far, oldest first; lines that a crash cut off are left out."""
        with contextlib.suppress(OSError):
            return [entry for entry in read_json_lines(self.path) if isinstance(entry.get("kind"), str)]
        return []

    def summary(self) -> str:
        """`crash 2, failed save 1`, for the progress line; empty while nothing went wrong."""
        size = 0
        with contextlib.suppress(OSError):
            size = os.stat(self.path).st_size
        if size != self._size:
            self._size = size
            counts = Counter(e["kind"] for e in self.entries() if e["kind"] not in _SHOWN_ELSEWHERE)
            self._summary = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        return self._summary

    def note_crash(self, step: int) -> None:
        """Record that the last start ended without a word after `step`; refuse if it did so three times in a row.

        Raises HopelessError then. That refusal breaks the row: starting once more tries three more times.
        """
        entries = self.entries()
        last = next((i for i in reversed(range(len(entries))) if entries[i]["kind"] == "crash"), -1)
        causes = [e for e in entries[last + 1 :] if e["kind"] in ("error", "hang")]
        cause = str(causes[-1].get("what", "")) if causes else "killed without a word (out of memory, a signal, power)"
        self.add("crash", step, cause=cause)
        row = [e for e in self.entries() if e["kind"] in ("crash", "refused")][-CRASHES_TO_REFUSE:]
        if len(row) == CRASHES_TO_REFUSE and all(e["kind"] == "crash" and e.get("step") == step for e in row):
            self.add("refused", step, cause=cause)
            raise HopelessError(
                f"{CRASHES_TO_REFUSE} starts in a row ended in step {step + 1}, the last with: {cause}. Mend the cause "
                f"({self.path} has all of them); started again, the run tries {CRASHES_TO_REFUSE} more times"
            )
