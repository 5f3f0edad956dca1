"""The goals of the training step, and how measured rows stand to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.bench_train_step import OURS, PEERS, best
from benchmarks.roofline import short_name

NOT_MEASURED = "not yet measured"
IMAGES_PER_SECOND = {"deit_base": 4448, "deit_small": 14000, "deit_tiny": 30000}
"""On one H100 at 224 px; DeiT-B's is 300 epochs of ImageNet-1k in a day."""
TIMES_BEST_PEER = 1.5
FIRST_STEP_SECONDS = 20.0
MEMORY_SHARE = 0.7
MEMORY_PEER = "timm + compile"


@dataclass(frozen=True)
class Goal:
    """One line of the goal table. measured, ratio: in words; met: None where nothing was measured."""

    name: str
    goal: str
    measured: str
    peer: str
    met: bool | None


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """The table from the rows of `bench_train_step` on a GPU."""
    lines = []
    for model, target in IMAGES_PER_SECOND.items():
        ours, peer = best(rows, model, [OURS]), best(rows, model, PEERS)
        speed = ours["images_per_second"] if ours else None
        measured, met = (f"{speed:,.0f}", speed >= target) if speed else (NOT_MEASURED, None)
        beside, ratio = NOT_MEASURED, None
        if ours and peer:
            ratio = ours["images_per_second"] / peer["images_per_second"]
            beside = f"{ratio:.2f} x {peer['key']['way']} ({peer['images_per_second']:,.0f})"
        lines.append(Goal(f"{short_name(model)}, images/s", f"{target:,}", measured, beside, met))
        met = None if ratio is None else ratio >= TIMES_BEST_PEER
        measured = NOT_MEASURED if ratio is None else f"{ratio:.2f} x"
        lines.append(Goal(f"{short_name(model)}, times the best peer", f"{TIMES_BEST_PEER:g} x", measured, "", met))
        lines += [_first_step(model, ours, peer), _memory(model, ours, best(rows, model, [MEMORY_PEER]))]
    return lines


def _first_step(model: str, ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> Goal:
    name, goal = f"{model}, first step", f"within {FIRST_STEP_SECONDS:g} s"
    if ours is None:
        return Goal(name, goal, NOT_MEASURED, "", None)
    beside = f"{peer['key']['way']}: {peer['first_step_s']:.1f} s" if peer else ""
    return Goal(name, goal, f"{ours['first_step_s']:.1f} s", beside, ours["first_step_s"] <= FIRST_STEP_SECONDS)


def _memory(model: str, ours: dict[str, Any] | None, peer: dict[str, Any] | None) -> Goal:
    name, goal = f"{model}, peak memory", f"{MEMORY_SHARE:g} x {MEMORY_PEER}"
    if not (ours and peer and "memory_gib" in ours and "memory_gib" in peer):
        return Goal(name, goal, NOT_MEASURED, "", None)
    share = ours["memory_gib"] / peer["memory_gib"]
    beside = f"{ours['memory_gib']:.1f} of {peer['memory_gib']:.1f} GiB"
    return Goal(name, goal, f"{share:.2f} x", beside, share <= MEMORY_SHARE)


def goal_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | goal | measured | beside the best peer | met |", "|---|--:|--:|---|---|"]
    words = {True: "yes", False: "no", None: ""}
    for line in goals(rows):
        lines.append(f"| {line.name} | {line.goal} | {line.measured} | {line.peer} | {words[line.met]} |")
    return "\n".join(lines)
