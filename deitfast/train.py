"""Training, top to bottom: set up, resume, loop, evaluate, save."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deitfast import checkpoint
from deitfast.checkpoint import Checkpoint
from deitfast.data import Dataset, Manifest, Plan, TooManyBadFiles, TrainLoader, open_dataset
from deitfast.data.decoder import choose_decoder
from deitfast.data.manifest_file import read_manifest, write_manifest
from deitfast.data.pipeline import thread_count
from deitfast.distributed import World, start
from deitfast.drop_path import DropPath
from deitfast.errors import DeitfastError
from deitfast.evaluate import Scores, evaluate
from deitfast.interrupt import EXIT_INTERRUPTED, StopRequest
from deitfast.memory import largest_micro_batch
from deitfast.meter import Meter
from deitfast.model import DeiT, create_model
from deitfast.optim import learning_rate
from deitfast.recipe import Recipe
from deitfast.report import RunFolder, duration, environment
from deitfast.step import Step, make_step
from deitfast.teacher import load_teacher

IMAGES = "images.npz"
"""The run's list of training images, in its folder."""


@dataclass
class Run:
    """Everything one training run consists of on this process. `folder` is None except on the leading process."""

    recipe: Recipe
    world: World
    train_data: Manifest
    val_data: Manifest
    plan: Plan
    micro_batch: int
    accumulation: int
    bf16: bool
    decode: str  # where images are decoded: gpu or cpu
    model: DeiT
    engine: Step
    folder: RunFolder | None
    notes: list[str]  # what was found out while setting up, for the log
    step: int = 0
    best: dict[str, Any] | None = None

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.plan.steps_per_epoch

    def say(self, text: str) -> None:
        """One line from the leading process."""
        if self.folder:
            self.folder.say(text)

    def warn(self, text: str) -> None:
        """One line from whichever process has something to tell."""
        if self.folder:
            self.folder.say(text)
        else:
            print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Result:
    """What a run ended with. `ema` is None where no average is kept; images_per_second is of the training steps."""

    step: int
    raw: Scores
    ema: Scores | None
    images_per_second: float


def train(
    recipe: Recipe, *, stop_at: int | None = None, eval_images: int | None = None, depth: int | None = None
) -> Result | None:
    """Run `recipe` on this process, one of torchrun's or the only one; resume if its run folder holds a checkpoint.

    stop_at: save and return after this step; the result is None then, unless eval_images is given.
    eval_images: evaluate on the first so many images only. depth: blocks of the model where not its own number.
    Raises DeitfastError for anything the user can mend; what can be checked is checked before a file is written.
    """
    recipe.check()
    run, data = set_up(recipe, depth)
    try:
        begin(run, data)
        with TrainLoader(
            run.train_data,
            replace(recipe, decode=run.decode),
            image_size=run.model.image_size,
            micro_batch=run.micro_batch,
            rank=run.world.rank,
            world=run.world.size,
            device=run.world.device,
            start_step=run.step,
            stop_step=run.total_steps,
            say=run.warn,
            bad_list=Path(recipe.out) / "bad.txt",
        ) as loader:
            try:
                with StopRequest() as stop:
                    result = loop(run, loader, stop, stop_at, eval_images)
            except TooManyBadFiles:
                save(run)
                raise
            except torch.OutOfMemoryError as error:
                raise out_of_memory(run) from error
        if result is None and run.step == run.total_steps:  # resumed after the last step
            result = evaluate_both(run, 0.0, eval_images)
        if result and run.step == run.total_steps:
            conclude(run, result)
    finally:
        if run.folder:
            run.folder.close()
    run.world.barrier()
    return result


def loop(
    run: Run, loader: TrainLoader, stop: StopRequest, stop_at: int | None, eval_images: int | None
) -> Result | None:
    """Every step from `run.step` on; the last evaluation's result. See `train`.

    Raises SystemExit(75) after saving, once the processes have agreed that one of them got a SIGTERM: at once where
    there is one process, else at the next log step.
    """
    recipe, world, plan = run.recipe, run.world, run.plan
    batches = iter(loader)
    meter = Meter(recipe, world, loader, run.engine, stop, run.step, run.total_steps, plan.steps_per_epoch)
    log_every = recipe.log_every or (50 if world.device.type == "cuda" else 1)
    last_step = run.total_steps if stop_at is None else min(stop_at, run.total_steps)
    saved_at, result = time.monotonic(), None
    run.model.train()

    while run.step < last_step:
        lr = learning_rate(recipe, run.step, plan.steps_per_epoch)
        run.engine(batches, run.step, lr)
        run.step += 1

        # Everything that waits for the device happens at log steps, and every pause is one.
        epoch, in_epoch = divmod(run.step, plan.steps_per_epoch)
        epoch_ended, stopping = in_epoch == 0, run.step == last_step
        leaving = stop.received and world.size == 1
        if not (run.step % log_every == 0 or epoch_ended or stopping or leaving):
            continue
        meter.log(run.step, lr, run.folder, run.best)
        if meter.asked_to_stop:
            save(run)
            run.say(f"SIGTERM: saved at step {run.step}. The same command resumes")
            raise SystemExit(EXIT_INTERRUPTED)
        if (
            run.step == run.total_steps
            or (epoch_ended and epoch % recipe.eval_every == 0)
            or (stopping and eval_images)
        ):
            result = evaluate_both(run, meter.images_per_second, eval_images)
            record(run, result)
        if epoch_ended or stopping or time.monotonic() - saved_at > 60 * recipe.save_minutes:
            save(run)
            saved_at = time.monotonic()
        meter.resume()
    return result


def set_up(recipe: Recipe, depth: int | None = None) -> tuple[Run, Dataset]:
    """Join the processes, open the data, make the model, take the run folder: all that can fail on a user's mistake."""
    world = start(recipe.device)
    data = world.agree(lambda: open_data(recipe, world))
    assert data.train is not None
    assert data.val is not None
    notes: list[str] = []
    scanned = data.train
    train_data = world.agree(lambda: run_images(recipe, scanned, notes.append))
    images = len(train_data)
    plan = world.agree(lambda: Plan(images, recipe.batch, recipe.repeats, recipe.seed, recipe.mix_group))
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and world.device.type == "cuda")
    torch.manual_seed(recipe.seed)
    model = world.agree(lambda: make_model(recipe, len(data.classes), depth)).to(world.device)
    micro_batch, accumulation = world.agree(lambda: split_batch(recipe, world, model, bf16))
    world.agree(lambda: DropPath(model, recipe, micro_batch))  # before the processes join in anything
    threads = thread_count(recipe.workers)
    decode = world.agree(
        lambda: (
            choose_decoder(recipe.decode, train_data, model.image_size, world.device, threads, notes.append)
            if world.leads
            else ""
        )
    )
    decode = world.share(decode)  # the pixels of the two differ a little: the same everywhere
    teacher = None
    if recipe.distillation != "none":
        teacher = world.agree(lambda: load_teacher(recipe, data.classes, world.device, model.image_size))
        teacher.check(
            data.val, world, crop_ratio=recipe.eval_crop_ratio, workers=recipe.workers, say=notes.append
        )  # fmt: skip
    engine = make_step(
        model, recipe, world, micro_batch=micro_batch, accumulation=accumulation, bf16=bf16, teacher=teacher
    )
    run = Run(
        recipe=recipe,
        world=world,
        train_data=train_data,
        val_data=data.val,
        plan=plan,
        micro_batch=micro_batch,
        accumulation=accumulation,
        bf16=bf16,
        decode=decode,
        model=model,
        engine=engine,
        folder=world.agree(lambda: RunFolder(recipe.out) if world.leads else None),
        notes=notes,
    )
    return run, data


def begin(run: Run, data: Dataset) -> None:
    """Resume from the run folder and write down what is about to run."""
    run.world.agree(lambda: resume(run))
    if run.folder:
        if run.recipe.allow_changes or not (run.folder.path / IMAGES).exists():
            write_manifest(run.folder.path / IMAGES, run.train_data)
        run.folder.write_settings(run.recipe, environment())
        run.folder.resume_metrics(run.step)
        introduce(run, data)


def run_images(recipe: Recipe, scanned: Manifest, say: Callable[[str], None]) -> Manifest:
    """The training images of a run: those found now, or, where the run folder has a list that differs, that list.

    The order of a run depends on how many images there are. One that vanished since the run began is replaced when its
    turn comes, and the others keep their turns; a new one waits for the next run.
    """
    path = Path(recipe.out) / IMAGES
    recorded = None if recipe.allow_changes else read_manifest(path, Path(scanned.root))
    if recorded is None or np.array_equal(recorded.checksum, scanned.checksum):
        return scanned
    gone = len(np.setdiff1d(recorded.checksum, scanned.checksum))
    new = len(np.setdiff1d(scanned.checksum, recorded.checksum))
    changed = f"{gone:,} of its {len(recorded):,} images are gone or changed and {new:,} are new"
    if recorded.classes != scanned.classes or gone > recipe.bad_limit * len(recorded):
        raise DeitfastError(
            f"{recipe.data} is not the data that {recipe.out} was trained with: {changed}. Change --out, or give "
            "--allow-changes"
        )
    say(f"{recipe.data} changed since the run began: {changed}. The run goes on with its own list, {path}")
    return recorded


def open_data(recipe: Recipe, world: World) -> Dataset:
    """Both splits; the first process of a machine speaks of damaged files and leaves manifests for the others."""
    data = open_dataset(recipe.data, quiet=world.local_rank > 0)
    for split, manifest in (("train", data.train), ("val", data.val)):
        if manifest is None:
            raise DeitfastError(f"{recipe.data} has no {split} images. Add {split}/<class>/*.jpg, or {split} shards")
    return data


def make_model(recipe: Recipe, classes: int, depth: int | None = None) -> DeiT:
    """The recipe's model, with weights from `init` where given."""
    return create_model(
        recipe.model,
        pretrained=recipe.init or False,
        num_classes=classes,
        image_size=recipe.image_size or None,
        drop_path=recipe.drop_path,
        constant_drop_path=recipe.drop_path_schedule == "constant",
        layer_scale=recipe.layer_scale or None,
        reset_head=recipe.reset_head,
        depth=depth,
        fused={"yes": True, "no": False, "auto": None}[recipe.fused],
    )


def split_batch(recipe: Recipe, world: World, model: DeiT, bf16: bool) -> tuple[int, int]:
    """(micro-batch, accumulation) such that micro-batch x processes x accumulation is the global batch."""
    unit = 2 if recipe.mixes else 1
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
    else:
        largest = largest_micro_batch(model, recipe, world, bf16)
        groups = [m for m in divisors if m % recipe.mix_group == 0] if recipe.drop_path_form == "subset" else divisors
        micro_batch = max((m for m in groups or divisors if m <= largest), default=unit)
    if micro_batch not in divisors:
        raise DeitfastError(
            f"--micro-batch {micro_batch} does not divide the {share} images that each of {world.size} process(es) "
            f"has of --batch {recipe.batch}. Valid: {', '.join(map(str, divisors))}"
        )
    return micro_batch, share // micro_batch


def out_of_memory(run: Run) -> DeitfastError:
    """What to say when the GPU's memory did not suffice."""
    device = run.world.device
    free, total = (x / 2**30 for x in torch.cuda.mem_get_info(device))
    unit = 2 if run.recipe.mixes else 1
    share = run.micro_batch * run.accumulation
    smaller = max((m for m in range(unit, run.micro_batch, unit) if share % m == 0), default=0)
    remedy = f"Try --micro-batch {smaller}, or --recompute" if smaller else "Give --recompute, or use a larger GPU"
    return DeitfastError(
        f"out of memory at micro-batch {run.micro_batch} ({total - free:.1f} of {total:.1f} GB in use). {remedy}"
    )


def evaluate_both(run: Run, images_per_second: float, limit: int | None) -> Result:
    """Scores of the raw and of the averaged weights."""

    def scores() -> Scores:
        return evaluate(
            run.model, run.val_data, run.world, crop_ratio=run.recipe.eval_crop_ratio, batch=run.micro_batch,
            workers=run.recipe.workers, bf16=run.bf16, limit=limit, decode=run.decode,
        )  # fmt: skip

    raw, averaged = scores(), None
    if run.recipe.ema_decay:
        with run.engine.averaged():
            averaged = scores()
    return Result(run.step, raw, averaged, images_per_second)


def record(run: Run, result: Result) -> None:
    """Write the scores down, and the better of raw and averaged weights if they are the run's best so far."""
    if not run.folder:
        return
    epoch = run.step // run.plan.steps_per_epoch
    use_ema = result.ema is not None and result.ema.top1 > result.raw.top1
    top1 = result.ema.top1 if use_ema and result.ema else result.raw.top1
    values = {
        "top1": result.raw.top1,
        "top5": result.raw.top5,
        "val_loss": result.raw.loss,
        "images": result.raw.images,
    }
    if result.ema:
        values |= {"ema_top1": result.ema.top1, "ema_top5": result.ema.top5, "ema_val_loss": result.ema.loss}
    run.folder.metrics(step=run.step, epoch=epoch, **values)
    ema_text = f", ema {result.ema.top1:.2f} %" if result.ema else ""
    run.say(f"epoch {epoch}: top-1 {result.raw.top1:.2f} %{ema_text} on {result.raw.images:,} images")
    if run.best is None or top1 > run.best["top1"]:
        run.best = {"top1": top1, "epoch": epoch, "weights": "ema" if use_ema else "raw"}
        tensors = run.engine.tensors()["ema" if use_ema else "model"]
        metadata = {
            "model": run.recipe.model,
            "image_size": str(run.model.image_size),
            "eval_crop_ratio": str(run.recipe.eval_crop_ratio),
            "classes": json.dumps(run.val_data.classes),
            **{key: str(value) for key, value in run.best.items()},
        }
        checkpoint.save_weights(run.folder.path / "best" / "model.safetensors", tensors, metadata)


def save(run: Run) -> None:
    """Write a checkpoint of `run` (the leading process; the state is the same everywhere)."""
    if not run.folder:
        return
    state = {"recipe": asdict(run.recipe), "best": run.best, "steps_per_epoch": run.plan.steps_per_epoch}
    checkpoint.save(run.folder.checkpoints, Checkpoint(run.step, run.engine.tensors(), state))


def resume(run: Run) -> None:
    """Bring `run` to the newest whole checkpoint of its folder, if there is one."""
    if run.folder:
        run.folder.check_recipe(run.recipe)
    found = checkpoint.load_newest(Path(run.recipe.out) / "ckpt", run.say)
    if found is None:
        return
    if found.state["steps_per_epoch"] != run.plan.steps_per_epoch and not run.recipe.allow_changes:
        raise DeitfastError(
            f"{run.recipe.out} was trained with {found.state['steps_per_epoch']} steps an epoch, the data now gives "
            f"{run.plan.steps_per_epoch}: the data changed. Change --out, or give --allow-changes"
        )
    run.engine.load(found.tensors)
    run.step, run.best = found.step, found.state["best"]
    run.say(f"resuming {run.recipe.out} at step {run.step}")


def introduce(run: Run, data: Dataset) -> None:
    """Say what is about to run, and how it differs from the paper."""
    recipe, world, plan = run.recipe, run.world, run.plan
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    run.say(
        f"{recipe.model}: {parameters:.2f} M parameters, {run.model.image_size} px, {len(data.classes)} classes, "
        f"{'bf16' if run.bf16 else 'fp32'} on {world.size} {world.device.type} process(es)"
    )
    run.say(
        f"{recipe.data}: {len(run.train_data):,} training and {len(run.val_data):,} validation images; an epoch has "
        f"{plan.steps_per_epoch} steps over {plan.distinct_per_epoch:,} distinct images"
    )
    run.say(
        f"batch {recipe.batch} = {world.size} process(es) x {run.accumulation} accumulated x {run.micro_batch}; "
        f"{run.total_steps:,} steps in all; run folder {run.folder.path if run.folder else ''}"
    )
    run.say(f"step: {run.engine.words}")
    for note in run.notes:
        run.say(note)
    for line in recipe.deviations(len(run.train_data)):
        run.say(f"not the paper's: {line}")
    if recipe.ema_decay and run.total_steps < 2 / (1 - recipe.ema_decay):
        run.say(f"the average of the weights reaches back {1 / (1 - recipe.ema_decay):,.0f} steps and will lag behind")


def conclude(run: Run, result: Result) -> None:
    """The last words: scores, speed, where everything lies."""
    if not run.folder:
        return
    ema = f" (ema {result.ema.top1:.2f} %)" if result.ema else ""
    speed = f", {result.images_per_second:,.0f} images/s" if result.images_per_second else ""
    run.say(
        f"done: top-1 {result.raw.top1:.2f} %{ema} on {result.raw.images:,} held-out images{speed}, "
        f"run folder {run.folder.path}"
    )


def smoke(recipe: Recipe) -> None:
    """Prove an installation: three small steps of `recipe` with a save and a resume between, and an evaluation.

    Batch, epochs and evaluated images shrink, and on CPU, for fresh weights, the depth; the code that runs and all else
    of the recipe do not. The run folder is temporary.
    """
    world = start(recipe.device)
    begun = time.monotonic()
    out = world.share(tempfile.mkdtemp(prefix="deitfast-smoke-") if world.leads else "")
    batch = 4 * world.size
    small = replace(
        recipe, out=out, epochs=1, warmup_epochs=0.0, batch=batch, mix_group=min(recipe.mix_group, batch // world.size),
        micro_batch=0, log_every=1, smoke=False,
    )  # fmt: skip
    depth = 2 if world.device.type == "cpu" and not recipe.init else None
    try:
        train(small, stop_at=2, depth=depth)
        train(small, stop_at=3, eval_images=16, depth=depth)
        if world.leads:
            lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
            losses = [f"{line['loss']:.3f}" for line in lines if "loss" in line]
            blocks = f" cut to {depth} blocks" if depth else ""
            print(
                f"smoke test passed: {recipe.model}{blocks} on {recipe.data}, {world.size} {world.device.type} "
                f"process(es), losses {', '.join(losses)}, saved and resumed at step 2, "
                f"{duration(time.monotonic() - begun)}"
            )
    finally:
        world.barrier()
        if world.leads:
            shutil.rmtree(out, ignore_errors=True)
