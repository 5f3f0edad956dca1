"""The runs' scores as a table, the claims' verdicts, and a picture of both."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.rows import Claim, Run, Score

HOLDS, DOES_NOT, WRONG_WAY, NOT_RUN = "holds", "does not show", "the opposite shows", "not yet run"
_BEYOND = 2.0
"""Standard errors that a difference must be beyond."""

Results = dict[str, dict[int, dict[str, Any]]]
"""What is written of every run, by its name and seed."""


def read(folder: Path) -> Results:
    """Every run's file in `folder`."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        done = json.loads(path.read_text())
        if "scores" in done:
            found.setdefault(done["run"], {})[done["seed"]] = done
    return found


def values(results: Results, score: Score, seeds: Sequence[int]) -> dict[int, float]:
    """The score by seed, in percent, of those seeds that have been run."""
    done = results.get(score.run, {})
    return {seed: done[seed]["scores"][score.weights][score.head] for seed in seeds if seed in done}


@dataclass(frozen=True)
class Difference:
    """Mean of the better minus the worse over seeds, in points, and its standard error; None below two seeds."""

    mean: float | None
    error: float | None
    seeds: int

    def __str__(self) -> str:
        return "" if self.mean is None or self.error is None else f"{self.mean:+.2f} ± {self.error:.2f}"

    def verdict(self, claim: Claim) -> str:
        if self.mean is None or self.error is None:
            return NOT_RUN
        apart = abs(self.mean) > _BEYOND * self.error
        if claim.equal:
            return DOES_NOT if apart else HOLDS
        if not apart:
            return DOES_NOT
        return HOLDS if self.mean > 0 else WRONG_WAY


def difference(results: Results, claim: Claim, seeds: Sequence[int]) -> Difference:
    """By seeds that both have. Two scores of one run share its noise, so its own differences are what vary there."""
    better, worse = (values(results, score, seeds) for score in (claim.better, claim.worse))
    both = [seed for seed in better if seed in worse]
    if len(both) < 2:
        return Difference(None, None, len(both))
    apart = [better[seed] - worse[seed] for seed in both]
    if claim.better.run == claim.worse.run:
        error = standard_error(apart)
    else:
        error = math.hypot(*(standard_error([side[seed] for seed in both]) for side in (better, worse)))
    return Difference(statistics.mean(apart), error, len(both))


def standard_error(sample: Sequence[float]) -> float:
    """Of the mean of a sample."""
    return statistics.stdev(sample) / math.sqrt(len(sample))


def speed_of(seeds: Mapping[int, Mapping[str, Any]]) -> float:
    """Training images a second of CPU over whole runs, set-up and evaluation included."""
    return sum(done["images"] for done in seeds.values()) / sum(done["cpu_seconds"] for done in seeds.values())


def scores_of(runs: Sequence[Run]) -> list[Score]:
    """The rows: averaged and raw weights of every run, and the heads of a distilled one."""
    rows = []
    for run in runs:
        rows += [Score(run.name), Score(run.name, "raw")]
        rows += [Score(run.name, head=head) for head in ("top1_head", "top1_dist") if run.distilled and run.teacher]
    return rows


def markdown(results: Results, runs: Sequence[Run], claims: Sequence[Claim], seeds: Sequence[int]) -> str:
    """Two tables: every score, and every claim with its verdict."""
    lines = [
        "| row | top-1 by seed | mean | spread | standard error | images a second of CPU |",
        "|---|---|---|---|---|---|",
    ]
    for score in scores_of(runs):
        top1 = list(values(results, score, seeds).values())
        if not top1:
            lines += [f"| {score} | {NOT_RUN} | | | | |"] if score.weights == "ema" and score.head == "top1" else []
            continue
        mean, spread = f"{statistics.mean(top1):.2f}", f"{max(top1) - min(top1):.2f}" if len(top1) > 1 else ""
        error = f"{standard_error(top1):.2f}" if len(top1) > 1 else ""
        speed = f"{speed_of(results[score.run]):.0f}" if score.weights == "ema" and score.head == "top1" else ""
        lines.append(f"| {score} | {', '.join(f'{v:.2f}' for v in top1)} | {mean} | {spread} | {error} | {speed} |")
    lines += ["", "| claim | seeds | averaged weights: difference | verdict | raw weights: difference | verdict |"]
    lines.append("|---|---|---|---|---|---|")
    for claim in claims:
        found = difference(results, claim, seeds)
        cells = [claim.text, str(found.seeds), str(found), found.verdict(claim)]
        if claim.better.weights == claim.worse.weights:
            raw = replace(claim, better=replace(claim.better, weights="raw"), worse=replace(claim.worse, weights="raw"))
            found = difference(results, raw, seeds)
            cells += [str(found), found.verdict(raw)]
        lines.append(f"| {' | '.join(cells + [''] * (6 - len(cells)))} |")
    return "\n".join(lines) + "\n"


def tokens(folder: Path) -> str:
    """How alike the two tokens of distilled runs are through depth; empty where nobody has looked."""
    found: dict[str, list[list[float]]] = {}
    for path in sorted(folder.glob("tokens-*.json")):
        done = json.loads(path.read_text())
        found.setdefault(done["run"], []).append(done["cosines"])
    if not found:
        return ""
    lines = ["", "| cosine of class and distillation token | as learned, then after every block (mean over seeds) |"]
    lines.append("|---|---|")
    for run, seeds in found.items():
        means = [statistics.mean(values) for values in zip(*seeds, strict=True)]
        lines.append(f"| {run} ({len(seeds)}) | {', '.join(f'{value:.2f}' for value in means)} |")
    return "\n".join(lines) + "\n"


def draw(results: Results, runs: Sequence[Run], seeds: Sequence[int], path: Path) -> None:
    """Losses along the runs, and the top-1 of every seed. Needs matplotlib."""
    from matplotlib.figure import Figure

    done = [run.name for run in runs if run.name in results]
    figure = Figure(figsize=(11, 0.35 * len(done) + 2.5), layout="constrained")
    curves, dots = figure.subplots(1, 2)
    for i, name in enumerate(done):
        losses = results[name][min(results[name])]["loss"]
        curves.plot(*zip(*losses, strict=True), linewidth=1, color=f"C{i % 10}", label=name)
        for marker, weights in (("o", "ema"), ("x", "raw")):
            top1 = values(results, Score(name, weights), seeds)
            dots.plot(list(top1.values()), [i] * len(top1), marker, color=f"C{i % 10}", markersize=5)
    curves.set(xlabel="step", ylabel="training loss (one seed)")
    dots.set(xlabel="top-1 in percent: o averaged, x raw weights", yticks=range(len(done)), yticklabels=done)
    dots.invert_yaxis()
    for axes in (curves, dots):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90, metadata={"Software": None})
