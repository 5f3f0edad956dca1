"""env.json: what a reader needs to interpret a run's numbers, and how it changed between the starts of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deitfast.files import read_json, write_json
from deitfast.guard import WIRE
from deitfast.integrity import hash_of_all

_TOLD = ("commit", "code", "torch", "triton", "python", "gpu", "wire")
_MOST_KEPT = 100


def environment() -> dict[str, Any]:
    """Versions, hardware, command, commit and a hash of the package's sources."""
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
        "wire": os.environ.get(WIRE) or "fp32",
        "commit": _commit(),
        "code": _code(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    if torch.cuda.is_available():
        facts["gpu"] = {
            "name": torch.cuda.get_device_name(),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
    return facts


def write_environment(path: Path, facts: dict[str, Any]) -> list[str]:
    """Write `facts` to `path` with those of earlier starts under "earlier"; how they differ from the last, in words."""
    before = read_json(path)
    earlier = before.pop("earlier", [])
    kept = [*(earlier if isinstance(earlier, list) else []), before] if before else []
    write_json(path, facts | {"earlier": kept[-_MOST_KEPT:]})
    return changes(before, facts)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`commit was X, is Y` for all that may change a run's numbers. Facts that one of them lacks are not compared."""
    differing = [name for name in _TOLD if name in before and before[name] != now.get(name)]
    if "commit" in differing and "code" in differing:
        differing.remove("code")  # the commit says it better
    return [f"{name} was {_short(before[name])}, is {_short(now.get(name))}" for name in differing]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{v}" for v in value.values())
    return str(value)[:12] if value else "none"


def _code() -> str:
    """Hash of the package's sources, uncommitted changes included."""
    package = Path(__file__).resolve().parent.parent
    return hash_of_all(sorted([*package.rglob("*.py"), *(package / "kernels").glob("*.py")]))[:12]


def _commit() -> str | None:
    package = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
