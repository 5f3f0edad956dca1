"""Results files: what ran where, in which state the machine was, and the rows as they come."""

from __future__ import annotations

import contextlib
import csv
import datetime
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Device = torch.device | str


# The machine ---------------------------------------------------------------------------------------------------------

_SMI_FIELDS = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "max_sm_clock": "clocks.max.sm",
    "throttle_reasons": "clocks_throttle_reasons.active",
    "power_cap": "power.limit",
    "power_draw": "power.draw",
    "temperature": "temperature.gpu",
}


def gpu_state() -> dict[str, str] | None:
    """Driver, clocks, throttle reasons, power and temperature of the GPU now, as nvidia-smi words them; None without.

    A field that this nvidia-smi does not know is left out.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None

    def query(fields: Sequence[str]) -> list[str] | None:
        command = [tool, *_smi_device(), "--query-gpu=" + ",".join(fields), "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = list(csv.reader(done.stdout.splitlines(), skipinitialspace=True))
        return lines[0] if done.returncode == 0 and lines and len(lines[0]) == len(fields) else None

    values = query(list(_SMI_FIELDS.values()))
    if values is not None:
        return dict(zip(_SMI_FIELDS, values, strict=True))
    single = {name: query([field]) for name, field in _SMI_FIELDS.items()}
    return {name: value[0] for name, value in single.items() if value} or None


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, Any]]:
    """What the GPU runs at while the body does, read again and again by a thread; filled at the end.

    sm_mhz and memory_mhz (medians), sm_mhz_least, power_w and temperature_c (highest), throttle (every reason seen) and
    readings (how many). What nvidia-smi does not tell is left out; empty without it.
    """
    found: dict[str, Any] = {}
    seen: list[dict[str, str]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set() and (state := gpu_state()):
            seen.append(state)
            over.wait(0.1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found |= _summary(seen)


_SUMMARY: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("sm_mhz", "sm_clock", statistics.median),
    ("sm_mhz_least", "sm_clock", min),
    ("memory_mhz", "memory_clock", statistics.median),
    ("power_w", "power_draw", max),
    ("temperature_c", "temperature", max),
)


def _summary(states: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field, reduce in _SUMMARY:
        words = [state.get(field, "").split(" ")[0] for state in states]
        if numbers := [float(word) for word in words if word.replace(".", "", 1).isdigit()]:
            found[name] = reduce(numbers)
    if reasons := {state["throttle_reasons"] for state in states if "throttle_reasons" in state}:
        found["throttle"] = sorted(reasons)
    return found | ({"readings": len(states)} if states else {})


def _smi_device() -> list[str]:
    if not torch.cuda.is_available():
        return []
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return [] if uuid is None else [f"--id=GPU-{uuid}"]


def _commit() -> str | None:
    """The commit that is checked out, marked where files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit and commit + (" with changes" if git("status", "--porcelain") else "")


def sources_digest() -> str:
    """First 16 hex digits of the SHA-256 of all Python files: names the code that ran where there is no git."""
    digest = hashlib.sha256()
    for folder in ("kernels", "deitfast", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def facts(device: Device = "cpu") -> dict[str, Any]:
    """What a number needs to mean anything later: machine and its state, versions, commit, command and date."""
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    state = gpu_state()
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = f"python -m {module.name}" if module is not None else " ".join(sys.argv[:1])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([program.removesuffix(".__main__"), *sys.argv[1:]]),
        "commit": _commit(),
        "sources": sources_digest(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_state": state,
        "driver": state.get("driver") if state else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


# The results file ----------------------------------------------------------------------------------------------------


class Recorder:
    """A results file that is whole after every row, so that a run which is cut off still counts.

    path: the JSON file, or None to keep rows in memory only. `data` holds what the file holds: theme, device, quick,
    facts, rows, and `finished`: None until `finish`, then the date and the GPU's state afterwards.
    """

    def __init__(self, path: Path | str | None, theme: str, device: Device, quick: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.data: dict[str, Any] = {"theme": theme, "device": str(device), "quick": quick, "facts": facts(device)}
        self.data |= {"rows": [], "finished": None}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["rows"]

    @property
    def refused(self) -> list[dict[str, Any]]:
        """Rows of wrong results; a benchmark that has any exits with a status other than 0."""
        return [row for row in self.rows if "refused" in row]

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        self._write()

    def replace(self, row: Mapping[str, Any]) -> None:
        """Put a row in the place of the one that has its key; at the end where there is none."""
        place = next((i for i, old in enumerate(self.rows) if old["key"] == row["key"]), len(self.rows))
        self.rows[place : place + 1] = [dict(row)]
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Set a top-level entry, such as the measured roof."""
        if name in ("theme", "device", "quick", "facts", "rows", "finished"):
            raise ValueError(f"Recorder.note: {name!r} is the recorder's own; choose another name")
        self.data[name] = value
        self._write()

    def finish(self) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.data["finished"] = {"date": date, "gpu_state": gpu_state()}
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        # allow_nan=False: NaN and Infinity are no JSON; a row that holds one is a mistake of the benchmark.
        text = json.dumps(self.data, indent=1, allow_nan=False, default=str) + "\n"
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        part.write_text(text)
        part.replace(self.path)


def load(path: Path | str) -> dict[str, Any]:
    """The contents of a Recorder's file. Raises ValueError in one line for anything else."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a results file: {error}") from None
    if not isinstance(data, dict) or not {"theme", "facts", "rows"} <= data.keys():
        raise ValueError(f"{path}: not a results file: no theme, facts and rows")
    return data
