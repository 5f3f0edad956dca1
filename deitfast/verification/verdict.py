"""What was found out about this machine's GPU, and where it is kept: a JSON file for all that it depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from deitfast.files import cache_folder, read_json, write_json
from deitfast.integrity import hash_of_all
from deitfast.kernels.replaced import OURS
from deitfast.kernels.tunable import Pick, entry_of

SLOWER = "slower here"
OTHER_ENTRIES = "ours, other entries"
"""An op's kernels by other entries than their launch tables'."""
REPORT = "Please report this line with the output of `deitfast doctor --json`"


@dataclass(frozen=True)
class OpVerdict:
    """What was found of one op. form: how it runs from now on, one of `deitfast.kernels.replaced`'s.

    why: what is wrong with its kernels, or that they are slower; empty where they run. ms: medians of each form, where
    they were timed. seed: of the random data. launches: each selection of its kernels (`deitfast.kernels.tunable`) ->
    the entry by which it runs; faster: those of them that are not the table's own, in words. tried: selection -> entry
    -> ms of the whole op.
    """

    op: str
    form: str = OURS
    why: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    launches: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    faster: dict[str, str] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """Whether its kernels are; they may be slower."""
        return not self.why or self.why.startswith(SLOWER)

    def __str__(self) -> str:
        times = ", ".join(f"{form} {ms:.3f} ms" for form, ms in self.ms.items())
        return f"{self.op}: {self.form}{f' ({self.why})' if self.why else ''}{f'; {times}' if times else ''}"


@dataclass
class Verdict:
    """What was found of all that a run uses. unverified: why nothing was, where that is so."""

    ops: list[OpVerdict] = field(default_factory=list)
    unverified: str = ""

    @property
    def all_ours(self) -> bool:
        """Whether every op runs its kernels."""
        return all(op.form == OURS for op in self.ops)

    @property
    def forms(self) -> dict[str, str]:
        """Op -> form, of all ops."""
        return {op.op: op.form for op in self.ops}

    @property
    def launches(self) -> dict[str, Pick]:
        """Selection -> entry, of all ops; TypeError where one is none."""
        return {name: entry_of(entry) for op in self.ops for name, entry in op.launches.items()}

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Verdict:
        return cls([OpVerdict(**op) for op in record["ops"]], record["unverified"])


def machine(device: torch.device) -> dict[str, str]:
    """What a verdict depends on besides the question: GPU, driver, torch, triton, the kernels' sources."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver(),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": sources(),
    }


def driver() -> str:
    """The NVIDIA driver's version, as its kernel module tells it; empty where it does not."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word[0].isdigit() and "." in word), "")


@functools.cache
def sources() -> str:
    """Hash of the package's sources but the commands and recipes: a verdict ends with the code that it is about."""
    package = Path(__file__).parent.parent
    rooms = ("", "kernels", "verification", "data", "model", "engine")
    return hash_of_all(path for room in rooms for path in sorted((package / room).glob("*.py")))[:16]


def remembered(key: dict[str, Any], find: Callable[[], dict[str, Any]], keeps: Callable[[dict[str, Any]], bool]) -> Any:
    """What `find` says, from the cache where it is there; put there where `keeps` agrees."""
    found = recall(key)
    if found is None:
        found = find()
        if keeps(found):
            keep(key, found)
    return found


def recall(key: dict[str, Any]) -> Any:
    """What the cache has for this key; None where it has nothing or cannot be read."""
    kept = read_json(_path(key))
    return kept.get("found") if kept.get("key") == json.loads(json.dumps(key)) else None


def keep(key: dict[str, Any], found: dict[str, Any]) -> None:
    """Put it into the cache; one that cannot be written is none."""
    path = _path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "found": found})


def _path(key: dict[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return cache_folder("verified") / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
