"""What a run leaves and says: its folder, the log, metrics.jsonl and the progress line."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Any

from deitfast.errors import DeitfastError
from deitfast.files import write_atomically
from deitfast.recipe import Recipe

_LOCK_PATIENCE_S = 10.0
_PLAIN_INTERVAL_S = 10.0


class RunFolder:
    """The folder of one run, owned by one process until closed.

    recipe.json, env.json   settings and machine
    log.txt                 what was said, with the time
    metrics.jsonl           one object per logged step or evaluation
    ckpt/ best/             checkpoints; the best weights so far
    """

    def __init__(self, path: str | Path, *, quiet: bool = False) -> None:
        """Lock `path`, creating it. Raises DeitfastError while another process holds it.

        quiet: what is said goes to log.txt alone.
        """
        self.path, self.quiet = Path(path), quiet
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(self.path / ".lock", "a+")  # noqa: SIM115 (held until close)
        except OSError as error:
            raise DeitfastError(f"cannot write the run folder {self.path}: {error.strerror}. Change --out") from error
        self._take_lock()
        self._log = open(self.path / "log.txt", "a")  # noqa: SIM115 (held until close)
        self._metrics: IO[str] | None = None
        self._last_progress = 0.0

    @property
    def checkpoints(self) -> Path:
        return self.path / "ckpt"

    def close(self) -> None:
        for file in (self._metrics, self._log, self._lock):
            if file is not None:
                file.close()

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to go on with a recipe that differs from the folder's in what determines the result."""
        recorded = self.path / "recipe.json"
        if recipe.allow_changes or not recorded.exists():
            return
        changes = recipe.changes(json.loads(recorded.read_text()))
        if changes:
            raise DeitfastError(
                f"{self.path} holds a run of another recipe: {'; '.join(changes)}. "
                "Change --out, or give --allow-changes"
            )

    def write_settings(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        for name, content in (("recipe.json", asdict(recipe)), ("env.json", environment)):
            write_atomically(self.path / name, partial(_write_json, content))

    def resume_metrics(self, step: int) -> None:
        """Open metrics.jsonl for appending, without lines of steps after `step`: those will be computed again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, lambda temporary: temporary.write_text("".join(f"{line}\n" for line in kept)))
        self._metrics = open(path, "a")  # noqa: SIM115 (held until close)

    def say(self, text: str) -> None:
        """One line to stdout and, with the time, to log.txt."""
        if not self.quiet:
            if sys.stdout.isatty() and self._last_progress:
                print()
            print(text, flush=True)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._log.flush()

    def metrics(self, **values: Any) -> None:
        """One line of metrics.jsonl."""
        assert self._metrics is not None, "resume_metrics opens the file"
        self._metrics.write(json.dumps(values) + "\n")
        self._metrics.flush()

    def progress(self, text: str, *, last: bool = False) -> None:
        """The progress line: in place on a terminal; elsewhere a plain line at most every ten seconds."""
        now = time.monotonic()
        if sys.stdout.isatty() and not self.quiet:
            print(f"\r\x1b[2K{text}", end="", flush=True)
            self._last_progress = now
        elif last or now - self._last_progress >= _PLAIN_INTERVAL_S:
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


def environment() -> dict[str, Any]:
    """What a reader needs to interpret the numbers: versions, hardware, command, commit."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": None,
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return facts


def duration(seconds: float) -> str:
    """`23h02m`, `4m05s` or `12s`."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def _commit() -> str | None:
    package = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash
