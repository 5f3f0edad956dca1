"""What a run leaves and says: its folder, the log, metrics.jsonl and the progress line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from deitfast.errors import DeitfastError
from deitfast.files import read_json, read_json_lines, write_atomically
from deitfast.recipe import Recipe
from deitfast.training.trackers import Trackers

_LOCK_PATIENCE_S = 10.0
_BYTES = 128  # of progress.json
_PLAIN_INTERVAL_S = 10.0
_DISPENSABLE = (r" step \d+/\d+", r" lr \S+", r" mem \S+", r" wait [^|]*%( \(process \d+\))?", r" \| top1 \S+")
"""Parts of the progress line that a narrow terminal does without, the first first."""


@dataclass(frozen=True)
class Reached:
    """How far a run got. step: steps done. saved: step of the newest checkpoint, or None. running: no end was noted."""

    step: int = 0
    saved: int | None = None
    running: bool = False


class Progress:
    """progress.json: how far a run got, for the next start of a run that died without a word.

    Overwritten in place after every step: a few microseconds, and no new block on a disk that is full. A process that
    dies leaves what it wrote; only a machine that dies may lose the last seconds.
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


class RunFolder:
    """The folder of one run, owned by one process until closed.

    recipe.json, env.json   settings; machine, and what was measured on it
    log.txt                 what was said, with the time
    metrics.jsonl           one object per logged step or evaluation
    faults.jsonl            one object per fault
    progress.json           how far the run got
    tracked.txt             by what name W&B and trackio know the run, where they are asked to
    tensorboard/            what TensorBoard reads, where it is asked to
    ckpt/ best/             checkpoints; the best weights so far

    On a disk that is full, what is said and measured is lost until there is space again; nothing stops for it.
    """

    def __init__(self, path: str | Path, *, quiet: bool = False) -> None:
        """Lock `path`, creating it. Raises DeitfastError while another process holds it.

        quiet: what is said goes to log.txt alone.
        """
        self.path, self.quiet = Path(path), quiet
        self.checkpoints = self.path / "ckpt"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until close)
            self._take_lock()
            self._log = open(self.path / "log.txt", "a")  # noqa: SIM115 (held until close)
            self.reached = Progress(self.path / "progress.json")
        except OSError as error:
            raise DeitfastError(
                f"cannot write the run folder {self.path}: {error.strerror}. Mend that, or change --out"
            ) from error
        self.trackers: Trackers | None = None  # that get every line of metrics.jsonl, too
        self._metrics: IO[str] | None = None
        self._last_progress = 0.0

    def close(self) -> None:
        if self.trackers:
            self.trackers.close()
        self.reached.close()
        for file in (self._metrics, self._log, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):  # a full disk does not take what is left to write
                    file.close()

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to go on with a recipe that differs from the folder's in what determines the result."""
        recorded = self.path / "recipe.json"
        if recipe.allow_changes or not recorded.exists():
            return
        try:
            changes = recipe.changes(json.loads(recorded.read_bytes()))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise DeitfastError(
                f"{recorded} cannot be read ({type(error).__name__}), so nobody knows what this folder was trained "
                'with. Restore it (ckpt/*/state.json has it under "recipe"), or give --allow-changes'
            ) from error
        if changes:
            raise DeitfastError(
                f"{self.path} holds a run of another recipe: {'; '.join(changes)}. "
                "Change --out, or give --allow-changes"
            )

    def resume_metrics(self, step: int) -> None:
        """Open metrics.jsonl for appending, without lines of steps after `step`: those will be computed again."""
        path = self.path / "metrics.jsonl"
        if self._metrics:
            self._metrics.close()
        if path.exists():
            kept = [json.dumps(line) + "\n" for line in measured(self.path) if line["step"] <= step]
            write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))
        self._metrics = open(path, "a")  # noqa: SIM115 (held until close)

    def steps_measured(self) -> int:
        """The last step of metrics.jsonl; 0 where there is none."""
        with contextlib.suppress(OSError):
            return max((line["step"] for line in measured(self.path)), default=0)
        return 0

    def say(self, text: str) -> None:
        """One line to stdout and, with the time, to log.txt."""
        if not self.quiet:
            _print(("\n" if sys.stdout.isatty() and self._last_progress else "") + text + "\n")
        self.note(text)

    def note(self, text: str) -> None:
        """One line to log.txt alone."""
        _append(self._log, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        assert self._metrics is not None, "resume_metrics opens the file"
        _append(self._metrics, json.dumps(values) + "\n")
        if self.trackers:
            self.trackers.send(values)

    def progress(self, text: str) -> None:
        """The progress line: in place on a terminal; elsewhere a plain line at most every ten seconds."""
        now = time.monotonic()
        if sys.stdout.isatty() and not self.quiet:
            _print(f"\r\x1b[2K{fitted(text, shutil.get_terminal_size().columns)}")
            self._last_progress = now
        elif now - self._last_progress >= _PLAIN_INTERVAL_S:
            self._last_progress = now
            self.say(text)

    def _take_lock(self) -> None:
        # Workers of a killed launcher die a moment after it: wait for them rather than send the user away.
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._lock.seek(0)
                    holder = self._lock.read().strip() or "another process"
                    raise DeitfastError(
                        f"run folder {self.path} locked by {holder}. Stop it, or change --out"
                    ) from None
                time.sleep(0.2)
        self._lock.truncate(0)
        self._lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()


def measured(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl, each with its `step`."""
    return [line for line in read_json_lines(folder / "metrics.jsonl") if type(line.get("step")) is int]


def fitted(line: str, columns: int) -> str:
    """The progress line for a terminal of so many columns: a line that wraps could not be written over in place."""
    for part in _DISPENSABLE:
        if len(line) < columns:
            break
        line = re.sub(part, "", line, count=1)
    return line[: columns - 1]


def duration(seconds: float) -> str:
    """`23h02m`, `4m05s` or `12s`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _append(file: IO[str], text: str) -> None:
    with contextlib.suppress(OSError):  # no space: the next line that fits brings what the file object still holds
        file.write(text)
        file.flush()


def _print(text: str) -> None:
    """To stdout; where nobody reads it any more (`| head -1`, a closed terminal), nowhere from now on."""
    try:
        print(text, end="", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for good)
