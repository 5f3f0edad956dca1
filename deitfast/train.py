"""Training, top to bottom: set up, resume, loop, evaluate, save."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitfast import checkpoint
from deitfast.checkpoint import Checkpoint
from deitfast.data import Batch, Dataset, Manifest, Plan, TrainLoader, open_dataset, philox, prepare
from deitfast.distributed import World, start
from deitfast.errors import DeitfastError
from deitfast.evaluate import Scores, evaluate
from deitfast.losses import training_loss
from deitfast.meter import Meter
from deitfast.model import DeiT, create_model, keep_scales
from deitfast.optim import (
    Ema,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from deitfast.recipe import Recipe
from deitfast.report import RunFolder, duration, environment


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
    model: DeiT
    optimizer: torch.optim.AdamW
    ema: Ema | None
    folder: RunFolder | None
    step: int = 0
    best: dict[str, Any] | None = None

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.plan.steps_per_epoch

    def say(self, text: str) -> None:
        if self.folder:
            self.folder.say(text)


@dataclass(frozen=True)
class Result:
    """What a run ended with. `ema` is None where no average is kept; images_per_second is of the training steps."""

    step: int
    raw: Scores
    ema: Scores | None
    images_per_second: float


def train(recipe: Recipe, *, stop_at: int | None = None, eval_images: int | None = None) -> Result | None:
    """Run `recipe` on this process, one of torchrun's or the only one; resume if its run folder holds a checkpoint.

    stop_at: save and return after this step; the result is None then, unless eval_images is given.
    eval_images: evaluate on the first so many images only.
    Raises DeitfastError for anything the user can mend; what can be checked is checked before a file is written.
    """
    recipe.check()
    run, data = set_up(recipe)
    try:
        begin(run, data)
        with TrainLoader(
            run.train_data,
            recipe,
            image_size=run.model.image_size,
            micro_batch=run.micro_batch,
            rank=run.world.rank,
            world=run.world.size,
            device=run.world.device,
            start_step=run.step,
            stop_step=run.total_steps,
        ) as loader:
            result = loop(run, loader, stop_at, eval_images)
        if result is None and run.step == run.total_steps:  # resumed after the last step
            result = evaluate_both(run, 0.0, eval_images)
        if result and run.step == run.total_steps:
            conclude(run, result)
    finally:
        if run.folder:
            run.folder.close()
    run.world.barrier()
    return result


def loop(run: Run, loader: TrainLoader, stop_at: int | None, eval_images: int | None) -> Result | None:
    """Every step from `run.step` on; the last evaluation's result. See `train`."""
    recipe, world, plan, model = run.recipe, run.world, run.plan, run.model
    batches = iter(loader)
    trained: nn.Module = model
    if world.size > 1:
        trained = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    meter = Meter(recipe, world, loader, run.step, run.total_steps, plan.steps_per_epoch)
    log_every = recipe.log_every or (50 if world.device.type == "cuda" else 1)
    last_step = run.total_steps if stop_at is None else min(stop_at, run.total_steps)
    saved_at, result = time.monotonic(), None
    model.train()

    while run.step < last_step:
        # One optimiser step: the global batch, as `accumulation` micro-batches on every process.
        lr = learning_rate(recipe, run.step, plan.steps_per_epoch)
        set_learning_rate(run.optimizer, lr)
        for micro in range(run.accumulation):
            batch = next(batches)
            reduce_now = world.size == 1 or micro == run.accumulation - 1
            with contextlib.nullcontext() if reduce_now else trained.no_sync():  # type: ignore[operator]
                with torch.autocast(world.device.type, torch.bfloat16, enabled=run.bf16):
                    images, targets = prepare(batch, recipe)
                    outputs = trained(images, drop_path_scales(model, batch, recipe.seed))
                loss = training_loss(outputs, targets) / run.accumulation
                loss.backward()
            meter.add(loss.detach())
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        if run.ema:
            run.ema.update(model)
        run.step += 1

        # Everything that waits for the device happens at log steps, and every pause is one.
        epoch, in_epoch = divmod(run.step, plan.steps_per_epoch)
        epoch_ended, stopping = in_epoch == 0, run.step == last_step
        if not (run.step % log_every == 0 or epoch_ended or stopping):
            continue
        meter.log(run.step, lr, run.folder, run.best)
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


def set_up(recipe: Recipe) -> tuple[Run, Dataset]:
    """Join the processes, open the data, make the model, take the run folder: all that can fail on a user's mistake."""
    world = start(recipe.device)
    data = world.agree(lambda: open_data(recipe, world))
    assert data.train is not None
    assert data.val is not None
    images = len(data.train)
    plan = world.agree(lambda: Plan(images, recipe.batch, recipe.repeats, recipe.seed, recipe.mix_group))
    micro_batch, accumulation = world.agree(lambda: split_batch(recipe, world))
    torch.manual_seed(recipe.seed)
    model = world.agree(lambda: make_model(recipe, len(data.classes))).to(world.device)
    run = Run(
        recipe=recipe,
        world=world,
        train_data=data.train,
        val_data=data.val,
        plan=plan,
        micro_batch=micro_batch,
        accumulation=accumulation,
        bf16=recipe.precision == "bf16" or (recipe.precision == "auto" and world.device.type == "cuda"),
        model=model,
        optimizer=make_optimizer(model, recipe),
        ema=Ema(model, recipe.ema_decay) if recipe.ema_decay else None,
        folder=world.agree(lambda: RunFolder(recipe.out) if world.leads else None),
    )
    return run, data


def begin(run: Run, data: Dataset) -> None:
    """Resume from the run folder and write down what is about to run."""
    run.world.agree(lambda: resume(run))
    if run.folder:
        run.folder.write_settings(run.recipe, environment())
        run.folder.resume_metrics(run.step)
        introduce(run, data)


def open_data(recipe: Recipe, world: World) -> Dataset:
    """Both splits; the first process of a machine speaks of damaged files and leaves manifests for the others."""
    data = open_dataset(recipe.data, quiet=world.local_rank > 0)
    for split, manifest in (("train", data.train), ("val", data.val)):
        if manifest is None:
            raise DeitfastError(f"{recipe.data} has no {split} images. Add {split}/<class>/*.jpg, or {split} shards")
    return data


def make_model(recipe: Recipe, classes: int) -> DeiT:
    """The recipe's model, with weights from `init` where given."""
    return create_model(
        recipe.model,
        pretrained=recipe.init or False,
        num_classes=classes,
        image_size=recipe.image_size or None,
        drop_path=recipe.drop_path,
        layer_scale=recipe.layer_scale or None,
        reset_head=recipe.reset_head,
        fused={"yes": True, "no": False, "auto": None}[recipe.fused],
    )


def split_batch(recipe: Recipe, world: World) -> tuple[int, int]:
    """(micro-batch, accumulation) such that micro-batch x processes x accumulation is the global batch."""
    unit = 2 if recipe.mixes else 1
    share, rest = divmod(recipe.batch, world.size)
    if rest or share % unit:
        even = "even " if unit == 2 else ""
        raise DeitfastError(
            f"--batch {recipe.batch} does not give {world.size} processes an {even}equal share. Use a multiple of "
            f"{unit * world.size}, or another number of processes"
        )
    largest = 128 if world.device.type == "cuda" else 32
    divisors = [m for m in range(unit, share + 1, unit) if share % m == 0]
    micro_batch = recipe.micro_batch or max((m for m in divisors if m <= largest), default=unit)
    if micro_batch not in divisors:
        raise DeitfastError(
            f"--micro-batch {micro_batch} does not divide the {share} images that each of {world.size} process(es) "
            f"has of --batch {recipe.batch}. Valid: {', '.join(map(str, divisors))}"
        )
    return micro_batch, share // micro_batch


def drop_path_scales(model: DeiT, batch: Batch, seed: int) -> Tensor | None:
    """Drop-path scales (depth, 2, B), a pure function of (seed, step, slot): the same at any world size and resume."""
    if not any(model.drop_path_rates):
        return None
    branches = 2 * len(model.blocks)
    draws = philox.uniforms(philox.DROP_PATH, batch.slots, batch.step, 0, seed, blocks=-(-branches // 4))
    uniform = torch.from_numpy(draws.reshape(-1, len(batch.slots))[:branches]).float()
    scales = keep_scales(uniform.view(-1, 2, len(batch.slots)), model.drop_path_rates)
    return scales.to(batch.images.device, non_blocking=True)


def evaluate_both(run: Run, images_per_second: float, limit: int | None) -> Result:
    """Scores of the raw and of the averaged weights."""

    def scores() -> Scores:
        return evaluate(
            run.model, run.val_data, run.world, crop_ratio=run.recipe.eval_crop_ratio, batch=run.micro_batch,
            workers=run.recipe.workers, bf16=run.bf16, limit=limit,
        )  # fmt: skip

    raw, averaged = scores(), None
    if run.ema:
        run.ema.swap(run.model)
        averaged = scores()
        run.ema.swap(run.model)
    return Result(run.step, raw, averaged, images_per_second)


def record(run: Run, result: Result) -> None:
    """Write the scores down, and the better of raw and averaged weights if they are the run's best so far."""
    if not run.folder:
        return
    epoch = run.step // run.plan.steps_per_epoch
    use_ema = run.ema is not None and result.ema is not None and result.ema.top1 > result.raw.top1
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
        tensors = run.ema.tensors if use_ema and run.ema else run.model.state_dict()
        metadata = {"model": run.recipe.model, **{key: str(value) for key, value in run.best.items()}}
        checkpoint.save_weights(run.folder.path / "best" / "model.safetensors", tensors, metadata)


def save(run: Run) -> None:
    """Write a checkpoint of `run` (the leading process; the state is the same everywhere)."""
    if not run.folder:
        return
    tensors = {"model": run.model.state_dict(), "optim": optimizer_tensors(run.model, run.optimizer)}
    if run.ema:
        tensors["ema"] = run.ema.tensors
    state = {"recipe": asdict(run.recipe), "best": run.best, "steps_per_epoch": run.plan.steps_per_epoch}
    checkpoint.save(run.folder.checkpoints, Checkpoint(run.step, tensors, state))


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
    run.model.load_state_dict(found.tensors["model"])
    load_optimizer_tensors(run.model, run.optimizer, dict(found.tensors["optim"]))
    if run.ema:
        run.ema.load(dict(found.tensors["ema"]))
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
    deviations = recipe.deviations(len(run.train_data))
    for line in deviations:
        run.say(f"not the paper's: {line}")
    if run.ema and run.total_steps < 2 / (1 - recipe.ema_decay):
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

    Batch, epochs and evaluated images shrink; nothing else of the recipe changes. The run folder is temporary.
    """
    world = start(recipe.device)
    begun = time.monotonic()
    out = world.share(tempfile.mkdtemp(prefix="deitfast-smoke-") if world.leads else "")
    small = replace(
        recipe, out=out, epochs=1, warmup_epochs=0.0, batch=4 * world.size, micro_batch=0, log_every=1, smoke=False
    )
    try:
        train(small, stop_at=2)
        train(small, stop_at=3, eval_images=16)
        if world.leads:
            lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
            losses = [f"{line['loss']:.3f}" for line in lines if "loss" in line]
            print(
                f"smoke test passed: {recipe.model} on {recipe.data}, {world.size} {world.device.type} process(es), "
                f"losses {', '.join(losses)}, saved and resumed at step 2, {duration(time.monotonic() - begun)}"
            )
    finally:
        world.barrier()
        if world.leads:
            shutil.rmtree(out, ignore_errors=True)
