"""What got faster or slower between two results files, beyond what the runs inside each file differ.

    python -m benchmarks.compare BEFORE.json AFTER.json [--fail] [--all]

Rows are matched by their `key`. Each holds the medians of at least two runs; the noise of a row is the larger spread
(slowest minus fastest run) of the two files, and at least one percent of the time. With --fail the exit status is 1
where a row is slower beyond noise, is refused now, or was measured before and is not now.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.record import load

LEAST_NOISE = 0.01
"""Fraction of the time below which two runs are never told apart, however close the repeated runs lie."""
CONDITIONS = ("gpu", "driver", "torch", "triton", "python", "threads")


@dataclass(frozen=True)
class Change:
    """One row of two files: milliseconds before and after, and how far apart they must be to differ."""

    name: str
    before_ms: float
    after_ms: float
    noise_ms: float

    @property
    def verdict(self) -> str:
        if abs(self.after_ms - self.before_ms) <= self.noise_ms:
            return "same"
        return "slower" if self.after_ms > self.before_ms else "faster"

    def line(self) -> str:
        ratio = self.before_ms / self.after_ms if self.after_ms else float("inf")
        return (
            f"{self.verdict:7} {self.name}: {self.before_ms:.4f} -> {self.after_ms:.4f} ms "
            f"({ratio:.3f}x as fast, noise {self.noise_ms:.4f} ms)"
        )


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps(row["key"], sort_keys=True)


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in row["key"].values())


def _medians(row: Mapping[str, Any]) -> list[float]:
    return [run["median_ms"] for run in row["runs"]]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """One entry for each row that both files measured, in the order of `after`."""
    old = {_key(row): row for row in before["rows"] if "runs" in row}
    found = []
    for row in after["rows"]:
        if "runs" not in row or _key(row) not in old:
            continue
        first, second = _medians(old[_key(row)]), _medians(row)
        before_ms, after_ms = statistics.fmean(first), statistics.fmean(second)
        spread = max(max(runs) - min(runs) for runs in (first, second))
        found.append(Change(_name(row), before_ms, after_ms, max(spread, LEAST_NOISE * max(before_ms, after_ms))))
    return found


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Rows that `before` measured and `after` did not, with the reason that `after` gives."""
    measured = {_key(row) for row in after["rows"] if "runs" in row}
    kinds = ("refused", "failed", "absent", "skipped")
    lines = []
    for row in before["rows"]:
        if "runs" not in row or _key(row) in measured:
            continue
        for other in after["rows"]:
            # A refused or skipped case has one row for all its ways, whose key is a part of theirs.
            kind = next((kind for kind in kinds if kind in other), None)
            if kind and other["key"].items() <= row["key"].items():
                lines.append(f"{_name(row)}: {kind}: {other[kind]}")
                break
        else:
            lines.append(f"{_name(row)}: no such row")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    parser.add_argument("--fail", action="store_true", help="exit with status 1 on a regression beyond noise")
    parser.add_argument("--all", action="store_true", help="also list what did not change")
    options = parser.parse_args(argv)
    try:
        before, after = load(options.before), load(options.after)
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for name in CONDITIONS:
        old, new = before["facts"].get(name), after["facts"].get(name)
        if old != new:
            print(f"not the same {name}: {old} before, {new} after")
    found = changes(before, after)
    for change in sorted(found, key=lambda change: change.after_ms / max(change.before_ms, 1e-9), reverse=True):
        if options.all or change.verdict != "same":
            print(change.line())
    missing = lost(before, after)
    for line in missing:
        print(f"lost    {line}")
    counts = {verdict: sum(change.verdict == verdict for change in found) for verdict in ("faster", "slower", "same")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f", {len(missing)} lost")
    if not found:
        print("compare: the files have no row in common", file=sys.stderr)
        return 2
    return 1 if options.fail and (counts["slower"] or missing) else 0


if __name__ == "__main__":
    sys.exit(main())
