"""What a run folder tells about its run, live or ended: read only, whatever state the files are in."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from deitfast.errors import DeitfastError
from deitfast.files import read_json
from deitfast.recipe import Recipe
from deitfast.training.faults import FaultLog
from deitfast.training.run_folder import Progress, Reached, measured

_LOG_TIME = "%Y-%m-%d %H:%M:%S"


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder has it.

    steps, evaluations: the lines of metrics.jsonl of either kind, in the order of their steps, each step once (the last
    line of a step counts: it was computed again after a crash). faults: of faults.jsonl. reached: None where nothing
    says how far the run is. log: lines of log.txt with their time.
    """

    path: Path
    name: str
    recipe: Recipe
    environment: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    reached: Reached | None
    log: list[tuple[datetime, str]]

    @property
    def step(self) -> int:
        """The last step that was done."""
        measured = self.steps[-1]["step"] if self.steps else 0
        return max(measured, self.reached.step if self.reached else 0)

    @property
    def training_hours(self) -> float:
        """Hours of the measured steps, evaluations and saves left out: images of each window over its speed."""
        before, seconds = 0, 0.0
        for line in self.steps:
            seconds += (line["step"] - before) * self.recipe.batch / max(line["images_per_second"], 1e-9)
            before = line["step"]
        return seconds / 3600

    @property
    def hours(self) -> float | None:
        """Hours from the first line of log.txt to the last, pauses between starts included; None without a log."""
        return (self.log[-1][0] - self.log[0][0]).total_seconds() / 3600 if self.log else None

    @property
    def processes(self) -> int:
        return int(self.environment.get("choices", {}).get("processes", 1))

    @property
    def starts(self) -> int:
        return 1 + len(self.environment.get("earlier", []))

    @property
    def state(self) -> str:
        """`ended`, `running or died`, or `stopped`, as far as a folder can tell."""
        if self.log and self.log[-1][1].startswith("done: "):
            return "ended"
        return "running, or died without a word" if self.reached and self.reached.running else "stopped"

    @property
    def best(self) -> tuple[float, int, str] | None:
        """(top-1, epoch, raw or ema) of the best evaluation; the earliest where several are as good."""
        scores = [
            (line[key], line["epoch"], weights)
            for line in self.evaluations
            for key, weights in (("top1", "raw"), ("ema_top1", "ema"))
            if key in line
        ]
        return max(scores, key=lambda score: score[0]) if scores else None


def read_run(path: Path) -> RunRecord:
    """The run in `path`. Raises DeitfastError for a folder that holds none."""
    try:
        stated = json.loads((path / "recipe.json").read_bytes())
        recipe = Recipe(**{f.name: stated[f.name] for f in fields(Recipe) if f.name in stated})
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DeitfastError(f"{path} is no run folder: recipe.json cannot be read ({error}). Give runs/NAME") from error
    lines = measured(path)
    return RunRecord(
        path,
        path.resolve().name,
        recipe,
        read_json(path / "env.json"),
        _each_step_once([line for line in lines if "images_per_second" in line]),
        _each_step_once([line for line in lines if "top1" in line]),
        FaultLog(path / "faults.jsonl").entries(),
        Progress(path / "progress.json").read(),
        _log(path / "log.txt"),
    )


def _each_step_once(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for _, line in sorted({line["step"]: line for line in lines}.items())]


def _log(path: Path) -> list[tuple[datetime, str]]:
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append((datetime.strptime(line[:19], _LOG_TIME), line[20:]))
    return found
