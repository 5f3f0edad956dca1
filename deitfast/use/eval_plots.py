"""Pictures of an evaluation: the confusion matrix and how far confidence can be believed. Wants matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deitfast.errors import DeitfastError
from deitfast.use.evaluate import Details

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_CLASSES = 40  # up to so many, the axes bear names


def write_plots(details: Details, classes: Sequence[str], folder: Path) -> list[Path]:
    """confusion.png, calibration.png and per_class.csv in `folder`; the files written."""
    figures = (confusion_figure(details, classes), calibration_figure(details))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("confusion.png", "calibration.png", "per_class.csv")]
    for figure, path in zip(figures, paths, strict=False):
        figure.savefig(path, dpi=100)

    images = details.confusion.sum(1).tolist()
    rows = zip(classes, details.per_class.tolist(), images, strict=True)
    lines = [
        f'{i},"{name}",{images},{"" if images == 0 else f"{top1:.3f}"}' for i, (name, top1, images) in enumerate(rows)
    ]
    paths[2].write_text("\n".join(["label,class,images,top1", *lines]) + "\n")
    return paths


def confusion_figure(details: Details, classes: Sequence[str]) -> Figure:
    """Share of each class's images by the class that they were taken for."""
    matrix = details.confusion
    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.0, 0.3 * len(matrix)), 12.0)
    figure = figure_class()(figsize=(side + 1.5, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares.numpy(), cmap="magma", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="answer", ylabel="class", title="share of a class's images, %")
    if len(classes) <= _NAMED_CLASSES:
        names = [name.split(",")[0][:20] for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, shrink=0.8)
    return figure


def calibration_figure(details: Details) -> Figure:
    """Accuracy over confidence, and how many images have which confidence."""
    count, confidence, right = details.bins.numpy().T
    used = count > 0
    figure = figure_class()(figsize=(5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="perfect")
    axes.plot(confidence[used] / count[used], right[used] / count[used], marker="o", label=f"ECE {details.ece:.3f}")
    axes.bar(
        (np.arange(len(count)) + 0.5) / len(count), count / count.sum(), width=0.9 / len(count),
        color="0.85", label="share of images", zorder=0,
    )  # fmt: skip
    axes.set(xlabel="confidence of the answer", ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))  # whole marks at 1
    axes.legend()
    return figure


def figure_class() -> Any:
    """matplotlib's Figure, which draws without a screen. Raises DeitfastError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DeitfastError("plots need matplotlib: pip install matplotlib, our extra [report]") from error
    return Figure
