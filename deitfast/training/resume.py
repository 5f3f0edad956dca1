"""Where a run goes on: its folder looked through, its newest whole checkpoint taken up, its state saved again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from deitfast.data import Dataset
from deitfast.data.manifest import read_manifest, write_manifest
from deitfast.engine.optim import learning_rate
from deitfast.errors import DeitfastError
from deitfast.files import write_json
from deitfast.recipe import Recipe, flag
from deitfast.training import checkpoint
from deitfast.training.checkpoint import Checkpoint
from deitfast.training.environment import environment, write_environment
from deitfast.training.run import IMAGES, Run, choices, introduce
from deitfast.training.saving import Saver
from deitfast.training.trackers import Trackers
from deitfast.training.watch import SAVE, Watch

_SCHEDULE = ("epochs", "lr", "min_lr", "warmup_lr", "warmup_epochs", "deit_compat")


class Diverged(DeitfastError):
    """The loss or ten gradients in a row are no longer finite. step: the last one; since: the last that was sound."""

    def __init__(self, message: str, step: int, since: int) -> None:
        super().__init__(message)
        self.step, self.since = step, since


def begin(run: Run, data: Dataset, stated: Recipe | None, track: Sequence[str] = ()) -> None:
    """Resume from the run folder and write down what is about to run. track: names of `trackers.TRACKERS`."""
    run.world.agree(lambda: _look_back(run))
    run.world.agree(lambda: resume(run))
    check_same_step(run)
    run.engine.broadcast()  # equal already, but for a machine with other generators or files
    run.world.agree(lambda: _write_down(run))
    run.world.agree(lambda: _open_trackers(run, track))
    if run.folder:
        introduce(run, data, stated)


def _look_back(run: Run) -> None:
    """Take note of a start that died without a word; refuse if it would die again."""
    before = run.folder.reached.read() if run.folder else None
    if run.folder and before and before.running:
        run.folder.reached.write(replace(before, running=False))  # one crash is noted once
        run.faults.note_crash(before.step)


def _write_down(run: Run) -> None:
    if not run.folder:
        return
    folder = run.folder
    images = folder.path / IMAGES
    try:
        if run.recipe.allow_changes or read_manifest(images) is None:
            write_manifest(images, run.train_data)
        facts = environment() | {"choices": choices(run), "step": run.engine.description}
        write_json(folder.path / "recipe.json", asdict(run.recipe))
        run.notes += [f"since the last start {change}" for change in write_environment(folder.path / "env.json", facts)]
        folder.resume_metrics(run.step)
    except OSError as error:
        raise DeitfastError(
            f"cannot write the run folder {folder.path}: {error.strerror or error}. Free space, or change --out"
        ) from error
    keep_every = run.recipe.keep_every * run.order.steps_per_epoch
    run.saver = Saver(folder.checkpoints, keep_every, run.say, folder.note, partial(run.faults.add, "failed save"))
    run.saver.saved = run.step or None
    run.reached()


def _open_trackers(run: Run, names: Sequence[str]) -> None:
    if run.folder and names:
        settings, path = asdict(run.recipe), run.folder.path
        run.folder.trackers = Trackers(names, path, settings, run.step, say=run.say, fault=run.faults.add)


def resume(run: Run) -> None:
    """Bring `run` to the newest whole checkpoint of its folder, if there is one.

    Raises DeitfastError where there is none though the folder speaks of one: a run does not start from nothing over
    what is left of another.
    """
    if run.folder:
        run.folder.check_recipe(run.recipe)
    found = _newest(run)
    if found is None:
        _refuse_to_lose(run)
        return
    if found.state["steps_per_epoch"] != run.order.steps_per_epoch and not run.recipe.allow_changes:
        raise DeitfastError(
            f"{run.recipe.out} was trained with {found.state['steps_per_epoch']} steps an epoch, the data now gives "
            f"{run.order.steps_per_epoch}: the data changed. Change --out, or give --allow-changes"
        )
    _take_up(run, found)
    if run.step > run.total_steps:
        raise DeitfastError(
            f"{run.recipe.out} is at step {run.step}, past the {run.total_steps} of --epochs {run.recipe.epochs}. Give "
            "more epochs, or change --out"
        )
    run.say(f"resuming {run.recipe.out} at step {run.step}")
    if told := schedule_jump(run.recipe, found.state["recipe"], run.step, run.order.steps_per_epoch):
        run.say(told)
    if run.step == run.total_steps:
        run.say(f"nothing is left to train: step {run.step} of {run.total_steps} is done")


def schedule_jump(recipe: Recipe, before: dict[str, Any], step: int, steps_per_epoch: int) -> str:
    """How the learning rate jumps where a run goes on at `step` by another schedule than before, in one line.

    before: the fields of the recipe that the run had until now. Empty where the rate goes on as it would have.
    """
    known = {f.name: before[f.name] for f in fields(Recipe) if f.name in before}
    last = learning_rate(Recipe(**known), max(step - 1, 0), steps_per_epoch)
    would, now = (learning_rate(r, step, steps_per_epoch) for r in (Recipe(**known), recipe))
    if step == 0 or now == would or step >= recipe.epochs * steps_per_epoch:
        return ""
    way = "rises" if now > last else "falls"
    changed = [flag(n) for n in _SCHEDULE if known.get(n) not in (None, getattr(recipe, n))]
    return (
        f"the learning rate {way} from {last:.2g} to {now:.2g} at step {step + 1}: the schedule is another one since "
        f"{', '.join(changed)} changed. A new run with --init {Path(recipe.out) / 'best'} begins with a warm-up instead"
    )


def check_same_step(run: Run) -> None:
    """Raise DeitfastError where the processes would go on from different checkpoints."""
    found = run.world.gather((run.step, run.resumed_from))
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        steps = found[0][0], found[other][0]
        same = ", of another run" if steps[0] == steps[1] else ""
        message = (
            f"process 0 would go on at step {steps[0]} and process {other} at step {steps[1]}{same}. "
            "Give an --out that all machines share"
        )
        raise DeitfastError(message if run.world.is_main else "")


def roll_back(run: Run, error: Diverged) -> None:
    """Bring a run that diverged to its newest checkpoint of before.

    Raises DeitfastError where there is none: a run that diverges before its first save has settings that do not train.
    """
    if run.saver:
        run.saver.join()
    found = _newest(run, before=error.since + 1)
    told = str(error) if run.folder else ""
    if found is None:
        raise DeitfastError(told and f"{told}. There is no checkpoint of before to go back to")
    _take_up(run, found)
    if run.folder:
        run.faults.add("roll-back", error.step, to=run.step)
        run.say(f"{error}. Going back to the checkpoint of step {run.step}; if it comes again, the run ends")
        run.folder.resume_metrics(run.step)
        run.reached()


def save(run: Run, watch: Watch, *, wait: bool = False) -> None:
    """Have a checkpoint of `run` written; to be called on every process, the leading one writes.

    wait: until it is on the disk. A process that hangs while the tensors are collected has the patience of a step, the
    disk that of a save.
    """
    tensors = run.engine.tensors()
    state: dict[str, Any] = {
        "recipe": asdict(run.recipe),
        "classes": list(run.train_data.classes),
        "best": run.best,
        "steps_per_epoch": run.order.steps_per_epoch,
        "evaluated": run.evaluated,
    }
    with watch.during(SAVE):
        if run.saver:
            run.saver.save(run.step, tensors, state)
            if wait:
                run.saver.join()


def is_saved(run: Run) -> bool:
    """Whether the run's present state is on the disk, as far as this process knows."""
    return run.saver is None or run.saver.saved == run.step


def _newest(run: Run, before: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint in the run's folder, of an earlier step than `before`; damaged ones are told."""

    def tell(text: str) -> None:
        run.say(text)
        if run.folder:
            run.faults.add("damaged checkpoint", run.step, what=text)

    return checkpoint.load_newest(Path(run.recipe.out) / "ckpt", tell, stems=run.engine.stems, before=before)


def _take_up(run: Run, found: Checkpoint) -> None:
    run.engine.load(found.tensors)
    run.step, run.best, run.resumed_from = found.step, found.state["best"], found.identity
    run.evaluated = found.state.get("evaluated", found.step)


def _refuse_to_lose(run: Run) -> None:
    if not run.folder:
        return
    before = run.folder.reached.read()
    reached = (before.saved or 0) if before else run.folder.steps_measured()
    if reached or (before is None and (run.folder.path / "best").is_dir()):
        raise DeitfastError(
            f"{run.folder.path} holds a run that had saved step {reached}, but no checkpoint is in "
            f"{run.folder.checkpoints}. Put its step-* folders back, or start anew with another --out"
        )
