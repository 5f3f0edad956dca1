"""--track: a run's numbers sent on to TensorBoard, Weights & Biases or trackio, as they are written.

metrics.jsonl stays the record and needs none of them. The leading process alone sends. A tracker that a new run cannot
open is its user's mistake; one that fails later is told once, noted as a fault, and from then on left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from deitfast.errors import DeitfastError, did_you_mean, first_line
from deitfast.files import write_atomically

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Each is the name of its package, of our extra, and its word after --track."""
_PROJECT = "deitfast"
_IDENTITY = "tracked.txt"  # in the run folder: by it a resumed run goes on as the same one

Send = Callable[[Mapping[str, float], int], None]
Opened = tuple[Send, Callable[[], None]]


def chosen_trackers(text: str) -> tuple[str, ...]:
    """The trackers of `tensorboard,wandb`. Raises DeitfastError for one that is unknown or not installed."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in TRACKERS:
            raise DeitfastError(
                f"--track {name} is unknown.{did_you_mean(name, TRACKERS)} There are {', '.join(TRACKERS)}"
            )
        if find_spec(name) is None:
            raise DeitfastError(f"--track {name} needs the package {name}: pip install {name}, our extra [{name}]")
    return names


class Trackers:
    """The trackers of one run, on its leading process.

    folder: the run's. settings: its recipe. step: steps done so far; what was sent of later ones will be sent again.
    say: gets a line for a tracker that fails. fault: gets kind, step and words of it.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int, *,
        say: Callable[[str], None], fault: Callable[[str, int, str], None],
    ) -> None:  # fmt: skip
        """Open them. Raises DeitfastError for one that a new run cannot open; a run that goes on does so without it."""
        self.say, self.fault = say, fault
        self._open: dict[str, Opened] = {}
        for name in names:
            try:
                self._open[name] = _OPEN[name](folder, dict(settings), step)
            except Exception as error:  # of the tracker's making
                if step == 0:
                    self.close()
                    raise DeitfastError(
                        f"--track {name} does not start: {first_line(error)}. Mend that, or leave it out"
                    ) from error
                self._failed(name, step, error)

    def send(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: its numbers as train/NAME or val/NAME. Lists by process are not sent."""
        step, kind = values["step"], "val" if "top1" in values else "train"
        numbers = {f"{kind}/{k}": v for k, v in values.items() if type(v) in (int, float) and k != "step"}
        for name, (send, _) in list(self._open.items()):
            try:
                send(numbers, step)
            except Exception as error:  # of the tracker's making
                del self._open[name]
                self._failed(name, step, error)

    def close(self) -> None:
        """Let them write what they still hold."""
        for name, (_, close) in self._open.items():
            try:
                close()
            except Exception as error:  # of the tracker's making
                self.say(f"--track {name} did not end well: {first_line(error)}")
        self._open.clear()

    def _failed(self, name: str, step: int, error: Exception) -> None:
        what = f"--track {name}: {type(error).__name__}: {first_line(error)}"[:500]
        self.fault("tracker", step, what)
        self.say(f"{what}. Training goes on without it; metrics.jsonl has every number")


def _identity(folder: Path) -> str:
    """What the run is called where names of run folders are not enough; made once, kept in the folder."""
    path = folder / _IDENTITY
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(uuid4().hex[:12]))
    return path.read_text().strip()


# Open one: (folder, settings, step) -> what sends the numbers of a step, and what ends it -----------------------------


def _tensorboard(folder: Path, settings: dict[str, Any], step: int) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)  # hides what a start that died sent too much
    writer.add_text("recipe", f"```json\n{json.dumps(settings, indent=1)}\n```", step)

    def send(numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def _wandb(folder: Path, settings: dict[str, Any], _: int) -> Opened:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT), id=_identity(folder), name=folder.resolve().name,
        config=settings, dir=str(folder), resume="allow", allow_val_change=True,
        settings=wandb.Settings(console="off"),
    )  # fmt: skip
    # Steps that are done again after a crash would be refused as its own steps, which only rise.
    run.define_metric("*", step_metric="step")
    return lambda numbers, step: run.log({**numbers, "step": step}), run.finish


def _trackio(folder: Path, settings: dict[str, Any], _: int) -> Opened:
    import trackio

    name = f"{folder.resolve().name}-{_identity(folder)}"  # by which it resumes
    run = trackio.init(project=_PROJECT, name=name, config=settings, resume="allow")
    return lambda numbers, step: run.log(dict(numbers), step=step), run.finish


_OPEN: dict[str, Callable[[Path, dict[str, Any], int], Opened]] = {
    "tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio,
}  # fmt: skip
