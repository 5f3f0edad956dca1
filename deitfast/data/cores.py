"""The CPU cores that this process may use: its mask, and its container's quota, shared by torchrun's processes."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Cores of this machine that its processes may use together, at least 1."""
    return max(1, int(min(len(os.sched_getaffinity(0)), _quota())))


def thread_count(workers: int) -> int:
    """Data threads of this process: `workers`, or the cores shared by torchrun's processes on this machine."""
    return workers or max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _quota() -> float:
    """Cores' worth of time that a container gives (cgroup v2's cpu.max, v1's cpu.cfs_*_us); infinite without one."""
    try:
        if (v2 := CGROUPS / "cpu.max").exists():
            quota, period = v2.read_text().split()
        else:
            quota, period = ((CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
