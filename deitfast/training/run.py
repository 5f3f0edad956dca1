"""One training run: everything it consists of on this process, how it is set up and introduced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deitfast.data import Dataset, Manifest, Order, TrainLoader, imagenet_classes, open_dataset
from deitfast.data.cores import thread_count
from deitfast.data.decoder import choose_decoder
from deitfast.data.manifest import read_manifest
from deitfast.data.staging import Stage, staged
from deitfast.distributed import World, start
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import Engine, make_engine
from deitfast.engine.losses import balancing_weights
from deitfast.engine.memory import LARGEST_EVALUATED, largest_micro_batch
from deitfast.engine.teacher import load_teacher
from deitfast.errors import DeitfastError
from deitfast.files import read_json
from deitfast.model.deit import DeiT
from deitfast.model.factory import model_of
from deitfast.model.zoo import find_variant
from deitfast.recipe import Recipe
from deitfast.training.faults import FaultLog
from deitfast.training.first_contact import trust_capture, trust_kernels
from deitfast.training.run_folder import Reached, RunFolder
from deitfast.training.saving import Saver
from deitfast.verification.verdict import Verdict, machine

IMAGES = "images.npz"
"""The run's list of training images, in its folder."""


@dataclass
class Run:
    """Everything one training run consists of on this process. `folder` is None except on the leading process."""

    recipe: Recipe
    world: World
    train_data: Manifest
    val_data: Manifest
    order: Order
    micro_batch: int
    accumulation: int
    bf16: bool
    decode: str  # where images are decoded: gpu or cpu
    model: DeiT
    engine: Engine
    folder: RunFolder | None
    notes: list[str]  # what was found out while setting up, for the log
    kernels: Verdict  # how each op runs, and why
    faults: FaultLog
    stage: Stage | None = None  # of one process a machine, where its data is copied to a disk of its own
    saver: Saver | None = None  # of the leading process, once the run has begun
    step: int = 0
    resumed_from: str = ""  # identity of the checkpoint
    died: bool = False  # by an exception that nobody expects
    evaluated: int = 0  # step of the last evaluation
    best: dict[str, Any] | None = None

    @property
    def eval_batch(self) -> int:
        """Images that a process evaluates at once."""
        return min(self.micro_batch, LARGEST_EVALUATED)

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.order.steps_per_epoch

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation belongs after the present step, whatever was done already."""
        epoch, in_epoch = divmod(self.step, self.order.steps_per_epoch)
        return self.step > 0 and (
            self.step == self.total_steps or (in_epoch == 0 and epoch % self.recipe.eval_every == 0)
        )

    def loader(self, stop_step: int) -> TrainLoader:
        """This process's micro-batches of the steps from the present one up to (not including) `stop_step`."""
        return TrainLoader(
            self.train_data, self.recipe, image_size=self.model.image_size, micro_batch=self.micro_batch,
            rank=self.world.rank, world_size=self.world.size, device=self.world.device, start_step=self.step,
            stop_step=stop_step, say=self.warn, bad_list=Path(self.recipe.out) / "bad.txt", decoder=self.decode,
        )  # fmt: skip

    def reached(self, *, running: bool = True) -> None:
        """Note on disk how far the run is. running: it goes on from here."""
        if self.folder and self.saver:  # the run has begun
            self.saver.poll()
            self.folder.reached.write(Reached(self.step, self.saver.saved, running))

    def close(self) -> None:
        """Let go of the run folder, with what is being written in full, and of what the engine holds."""
        if self.stage:
            self.stage.close()
        try:
            if self.saver:
                self.saver.join()
        finally:
            self.engine.close()
            self.reached(running=self.died)
            if self.folder:
                self.folder.close()

    def say(self, text: str) -> None:
        """One line from the leading process."""
        if self.folder:
            self.folder.say(text)

    def warn(self, text: str) -> None:
        """One line from whichever process has something to tell."""
        if self.folder:
            self.folder.say(text)
        if not self.folder or self.folder.quiet:
            print(text, file=sys.stderr, flush=True)


def set_up(
    recipe: Recipe, depth: int | None = None, quiet: bool = False, stage: Path | None = None
) -> tuple[Run, Dataset]:
    """Join the processes, open the data, make the model, take the run folder: all that can fail on a user's mistake."""
    world = start(recipe.device)
    world.agree(lambda: find_variant(recipe.model))  # a name that is not one, before the data's faults are looked for
    data = world.agree(lambda: open_data(recipe, world))
    assert data.train is not None
    assert data.val is not None
    notes: list[str] = []
    scanned = data.train
    train_data = world.agree(lambda: run_images(recipe, scanned, notes.append))
    val_data = data.val
    if stage:
        train_data, val_data = (world.agree(partial(staged, one, stage)) for one in (train_data, val_data))
    order = world.agree(lambda: Order.of(train_data.label, recipe))
    bf16 = world.wants_bf16(recipe.precision)
    torch.manual_seed(recipe.seed)
    model = world.agree(lambda: model_of(recipe, data.classes, depth)).to(world.device)
    if recipe.init and not recipe.reset_head and model.classes is None and data.classes != imagenet_classes():
        notes.append(
            f"{recipe.init} does not name its classes: its head is kept for the data's, in the order "
            f"{', '.join(data.classes[:3])}{', ...' if len(data.classes) > 3 else ''}. --reset-head starts a new one"
        )
    teacher = None  # before the memory is measured that it leaves
    if recipe.distillation != "none":
        teacher = world.agree(lambda: load_teacher(recipe, data.classes, world.device, model.image_size))
    teacher_bytes = teacher.image_bytes() if teacher else 0
    before = world.lead(lambda: choices_before(recipe, world.device))
    micro_batch, accumulation = fit(recipe, world, model, bf16, teacher_bytes, before)
    kernels = trust_kernels(recipe, world, model, micro_batch, bf16, before, notes.append)
    if not kernels.all_ours:  # eager PyTorch keeps more for the backward
        micro_batch, accumulation = fit(recipe, world, model, bf16, teacher_bytes, before)
    drop_path = world.agree(lambda: DropPath(model, recipe, micro_batch))
    threads = thread_count(recipe.workers)
    wanted = before.get("decode", "auto") if recipe.decode == "auto" else recipe.decode
    decode = world.lead(  # the pixels of the two differ a little: the same everywhere
        lambda: choose_decoder(wanted, train_data, model.image_size, world.device, threads, notes.append)
    )
    classes = list(data.classes)
    how = trust_capture(recipe, world, model, classes, micro_batch, accumulation, bf16, kernels, notes.append)
    if teacher:
        teacher.check(
            val_data, world, crop_ratio=recipe.eval_crop_ratio, workers=recipe.workers, decode=decode, say=notes.append
        )  # fmt: skip
    class_weights = None
    if recipe.class_weights == "balanced":
        class_weights = balancing_weights(train_data.label, len(classes)).to(world.device)
    engine = make_engine(
        model, how, world, drop_path, accumulation=accumulation, bf16=bf16, teacher=teacher,
        class_weights=class_weights,
    )  # fmt: skip
    run = Run(
        recipe=recipe,
        world=world,
        train_data=train_data,
        val_data=val_data,
        order=order,
        micro_batch=micro_batch,
        accumulation=accumulation,
        bf16=bf16,
        decode=decode,
        model=model,
        engine=engine,
        folder=world.agree(lambda: RunFolder(recipe.out, quiet=quiet) if world.is_main else None),
        notes=notes,
        kernels=kernels,
        faults=FaultLog(Path(recipe.out) / "faults.jsonl", process=world.rank),
    )
    if stage and world.local_rank == 0:
        run.stage = Stage([train_data, val_data], run.warn)
    return run, data


def run_images(recipe: Recipe, scanned: Manifest, say: Callable[[str], None]) -> Manifest:
    """The training images of a run: those found now, or, where the run folder has a list that differs, that list.

    The order of a run depends on how many images there are. One that vanished since the run began is replaced when its
    turn comes, and the others keep their turns; a new one waits for the next run.
    """
    path = Path(recipe.out) / IMAGES
    if path.with_name("recipe.json").exists() and read_manifest(path) is None:
        what = "cannot be read" if path.exists() else "is missing"
        say(f"{path} {what}: nobody can tell whether {recipe.data} changed since the run began. It is written anew")
    recorded = None if recipe.allow_changes else read_manifest(path, Path(scanned.root))
    if recorded is None or np.array_equal(recorded.checksum, scanned.checksum):
        return scanned
    before, now = ({(m.name(i), int(m.checksum[i])) for i in range(len(m))} for m in (recorded, scanned))
    gone = len(before - now)
    changed = f"{gone:,} of its {len(before):,} images are gone or changed and {len(now - before):,} are new"
    if recorded.classes != scanned.classes or gone > recipe.bad_limit * len(recorded):
        raise DeitfastError(
            f"{recipe.data} is not the data that {recipe.out} was trained with: {changed}. Change --out, or give "
            "--allow-changes"
        )
    say(f"{recipe.data} changed since the run began: {changed}. The run goes on with its own list, {path}")
    return recorded


def choices(run: Run) -> dict[str, Any]:
    """What was measured while setting up, for the run folder: chosen again it might differ, and with it the bits."""
    device = run.world.device
    return {
        "device": device.type, "processes": run.world.size, "decode": run.decode, "micro_batch": run.micro_batch,
        "kernels": run.kernels.record(), "machine": machine(device) if device.type == "cuda" else {},
    }  # fmt: skip


def choices_before(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The `choices` of the run that the recipe's folder holds; empty without one, or where it had another device.

    Raises DeitfastError for another device that nobody asked for: a driver that lost its GPUs must not bring a run to
    the CPU, nor to another dtype, on its own.
    """
    recorded = read_json(Path(recipe.out) / "env.json").get("choices")
    if not isinstance(recorded, dict) or recipe.allow_changes:
        return {}
    kind = recorded.get("device")
    if not kind or type(recorded.get("micro_batch")) is not int or recorded.get("decode") not in ("cpu", "gpu"):
        return {}
    if kind != device.type and recipe.device == "auto":
        raise DeitfastError(
            f"{recipe.out} has run on {kind} so far and would go on on {device.type} here. Mend what hides the other, "
            f"or give --device {device.type}"
        )
    return recorded if kind == device.type else {}


def open_data(recipe: Recipe, world: World) -> Dataset:
    """Both splits; the first process of a machine speaks of damaged files and leaves manifests for the others."""
    data = open_dataset(recipe.data, quiet=world.local_rank > 0)
    for split, manifest in (("train", data.train), ("val", data.val)):
        if manifest is None:
            raise DeitfastError(f"{recipe.data} has no {split} images. Add {split}/<class>/*.jpg, or {split} shards")
    return data


def fit(
    recipe: Recipe, world: World, model: DeiT, bf16: bool, teacher_bytes: int, before: dict[str, Any]
) -> tuple[int, int]:
    """(micro-batch, accumulation) that fit into the GPU with the least memory; before: of `choices_before`."""
    largest = min(world.gather(largest_micro_batch(model, recipe, world, bf16, teacher_bytes)))
    kept = before["micro_batch"] if before.get("processes") == world.size else 0
    return world.agree(lambda: split_batch(recipe, world, largest, kept))


def split_batch(recipe: Recipe, world: World, largest: int, before: int = 0) -> tuple[int, int]:
    """(micro-batch, accumulation) such that micro-batch x processes x accumulation is the global batch.

    largest: images that fit into memory at once, where the recipe leaves the micro-batch open. before: the micro-batch
    that the run had until now, which it keeps where that fits.
    """
    unit = recipe.unit
    share, rest = divmod(recipe.batch, world.size)
    if rest or share % unit:
        even = "even " if unit == 2 else ""
        raise DeitfastError(
            f"--batch {recipe.batch} does not give {world.size} processes an {even}equal share. Use a multiple of "
            f"{unit * world.size}, or another number of processes"
        )
    divisors = [m for m in range(unit, share + 1, unit) if share % m == 0]
    if recipe.micro_batch:
        micro_batch = recipe.micro_batch
    elif before in divisors and before <= largest:
        micro_batch = before
    else:
        groups = [m for m in divisors if m % recipe.mix_group == 0] if recipe.drop_path_form == "subset" else divisors
        micro_batch = max((m for m in groups or divisors if m <= largest), default=unit)
    if micro_batch not in divisors:
        raise DeitfastError(
            f"--micro-batch {micro_batch} does not divide the {share} images that each of {world.size} process(es) "
            f"has of --batch {recipe.batch}. Valid: {', '.join(map(str, divisors))}"
        )
    return micro_batch, share // micro_batch


def introduce(run: Run, data: Dataset, stated: Recipe | None) -> None:
    """Say what is about to run, and how it differs from the recipe's file or from the paper."""
    recipe, world, order = run.recipe, run.world, run.order
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    run.say(
        f"{recipe.model}: {parameters:.2f} M parameters, {run.model.image_size} px, {len(data.classes)} classes, "
        f"{'bf16' if run.bf16 else 'fp32'} on {world.size} {world.device.type} process(es)"
    )
    run.say(
        f"{recipe.data}: {len(run.train_data):,} training and {len(run.val_data):,} validation images; an epoch has "
        f"{order.steps_per_epoch} steps over {order.distinct_per_epoch:,} distinct images"
    )
    run.say(
        f"batch {recipe.batch} = {world.size} process(es) x {run.accumulation} accumulated x {run.micro_batch}; "
        f"{run.total_steps:,} steps in all; run folder {run.folder.path if run.folder else ''}"
    )
    run.say(f"step: {run.engine.description}")
    for note in run.notes:
        run.say(note)
    for line in recipe.deviations(len(run.train_data), stated):
        run.say(f"deviation: {line}")
    if recipe.ema_decay and run.total_steps < 2 / (1 - recipe.ema_decay):
        run.say(f"the average of the weights reaches back {1 / (1 - recipe.ema_decay):,.0f} steps and will lag behind")
