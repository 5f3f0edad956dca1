"""Changes to correct PTX that take away what makes it correct."""

from __future__ import annotations

import re
from collections.abc import Callable

Change = Callable[[str], str]

WAIT_CP_ASYNC = r"cp\.async\.wait_group\s+\d+;"
WAIT_WGMMA = r"wgmma\.wait_group\.sync\.aligned\s+\d+;"
WAIT_MBARRIER = r"@!complete bra\.uni waitLoop;"
WAIT_STORE = r"cp\.async\.bulk\.wait_group\.read\s+\d+;"
BARRIER = r"bar\.sync\s+0;"
FENCE = r"fence\.proxy\.async\.shared::cta;"
"""What orders a kernel's accesses, as Triton prints it."""


def without(pattern: str, which: int | None = None) -> Change:
    """A change that removes all matches of a pattern, or one of them; it must find some."""

    def change(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        assert matches, f"no {pattern} in the PTX"
        for match in reversed(matches if which is None else [matches[which]]):
            ptx = ptx[: match.start()] + ptx[match.end() :]
        return ptx

    return change


def replaced(pattern: str, by: str | Callable[[re.Match[str]], str], count: int = 0) -> Change:
    """A change that replaces matches of a pattern; it must find some."""

    def change(ptx: str) -> str:
        changed, found = re.subn(pattern, by, ptx, count=count)
        assert found, f"no {pattern} in the PTX"
        return changed

    return change


def in_kernel(name: str, change: Change) -> Change:
    """A change to the PTX of one kernel; that of others stays as it is."""
    return lambda ptx: change(ptx) if f".entry {name}(" in ptx else ptx
