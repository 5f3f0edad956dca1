"""The curves of runs as SVG, one chart a quantity, all runs in each. Wants matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deitfast.model.work import gpu_of, mfu
from deitfast.model.zoo import VARIANTS
from deitfast.training.run_record import RunRecord
from deitfast.use.eval_plots import figure_class

_MOST_POINTS = 1000  # of a line: more are no wider than a pixel, and a page would not open
_WIDTH, _HEIGHT = 5.2, 2.9  # inches
_SMOOTH = 0.05  # share of a line's points that are averaged


@dataclass(frozen=True)
class Series:
    """One line of a chart: y over epochs. dashed: of averaged weights."""

    run: str
    epochs: list[float]
    values: list[float]
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What is drawn in one picture. smoothed: also a running mean, of what is noisy from step to step."""

    key: str
    title: str
    unit: str
    series: list[Series]
    smoothed: bool = False


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Every chart for which at least one of the runs has a number."""
    found = [
        Chart("loss", "training loss", "", [_of_steps(run, "loss") for run in runs], smoothed=True),
        Chart("accuracy", "top-1: raw, and averaged weights dashed", "%", [s for run in runs for s in _accuracy(run)]),
        Chart("val_loss", "validation loss", "", [_of_evaluations(run, "val_loss") for run in runs]),
        Chart("lr", "learning rate", "", [_of_steps(run, "lr") for run in runs]),
        Chart(
            "images_per_second", "throughput", "images/s", [_of_steps(run, "images_per_second") for run in runs], True
        ),
        Chart("mfu", "model FLOPs of the datasheet's", "%", [s for run in runs if (s := _mfu(run))], smoothed=True),
        Chart("data_wait", "waiting for data", "%", [_of_steps(run, "data_wait", 100) for run in runs], smoothed=True),
        Chart("memory", "memory of the fullest moment", "GiB", [_of_steps(run, "memory_gib") for run in runs]),
        Chart("faults", "faults so far", "", [_faults(run) for run in runs if run.faults]),
    ]
    return [chart for chart in found if any(series.values for series in chart.series)]


def svg(chart: Chart, colours: dict[str, str]) -> str:
    """The chart as an <svg> element. colours: by run."""
    figure_class()
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.key, "font.size": 9}):
        figure = figure_class()(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for series in chart.series:
            _draw(axes, chart, series, colours[series.run])
        if chart.smoothed:  # a first step is slow, and would flatten all others
            low, high = np.percentile(np.concatenate([s.values for s in chart.series]), [0.5, 99.5])
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
        axes.set(xlabel="epoch", ylabel=chart.unit, title=chart.title)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    head, rest = drawn[drawn.index("<svg") :].split(">", 1)
    head = re.sub(r' (height|width)="[^"]*"', "", head)  # as wide as its place on the page
    # Several pictures share one page, and so one space of names.
    return re.sub(r'(id="|url\(#|href="#)', rf"\1{chart.key}-", f"{head}>{rest}")


def _draw(axes: Any, chart: Chart, series: Series, colour: str) -> None:
    x, y = thinned(series.epochs), thinned(series.values)
    style: dict[str, Any] = {"color": colour, "linestyle": "--" if series.dashed else "-", "linewidth": 1.3}
    if len(x) == 1:
        axes.plot(x, y, marker="o", color=colour)
    elif chart.key == "faults":
        axes.step(x, y, where="post", **style)
        axes.yaxis.get_major_locator().set_params(integer=True)
    elif chart.smoothed and len(x) > 20:
        width = max(2, round(_SMOOTH * len(x)))
        mean = np.convolve(y, np.ones(width) / width, "valid")
        axes.plot(x, y, color=colour, linewidth=0.6, alpha=0.3)
        axes.plot(x[width - 1 :], mean, **style)
    else:
        axes.plot(x, y, marker="." if len(x) < 40 else None, **style)


def thinned(values: Sequence[float]) -> np.ndarray:
    """At most `_MOST_POINTS` values: means of equal stretches, the last of which may be shorter."""
    array = np.asarray(values, dtype=np.float64)
    stretch = -(-len(array) // _MOST_POINTS)
    if stretch <= 1:
        return array
    starts = np.arange(0, len(array), stretch)
    return np.add.reduceat(array, starts) / np.diff([*starts, len(array)])


def _of_steps(run: RunRecord, key: str, factor: float = 1.0) -> Series:
    lines = [line for line in run.steps if isinstance(line.get(key), (int, float))]
    return Series(run.name, [line["epoch"] for line in lines], [factor * line[key] for line in lines])


def _of_evaluations(run: RunRecord, key: str, dashed: bool = False) -> Series:
    lines = [line for line in run.evaluations if key in line]
    return Series(run.name, [line["epoch"] for line in lines], [line[key] for line in lines], dashed)


def _accuracy(run: RunRecord) -> list[Series]:
    return [_of_evaluations(run, "top1"), _of_evaluations(run, "ema_top1", dashed=True)]


def _mfu(run: RunRecord) -> Series | None:
    """None for a GPU without a datasheet here, for a CPU, and for a model of another size than its name's."""
    gpu = gpu_of((run.environment.get("gpu") or {}).get("name", ""))
    if gpu is None or run.recipe.model not in VARIANTS or run.recipe.image_size:
        return None
    peak = gpu.tflops * run.processes
    speed = _of_steps(run, "images_per_second")
    return Series(run.name, speed.epochs, [100 * mfu(value, run.recipe.model, peak) for value in speed.values])


def _faults(run: RunRecord) -> Series:
    """How many faults until when, over the epochs of their steps, from the run's begin to where it is."""
    last = run.steps[-1] if run.steps else {"step": 1, "epoch": 1.0}
    epochs = sorted(float(fault.get("step", 0)) * last["epoch"] / last["step"] for fault in run.faults)
    ends = [0.0, *epochs, max([last["epoch"], *epochs])]
    return Series(run.name, ends, [float(min(i, len(epochs))) for i in range(len(ends))])
