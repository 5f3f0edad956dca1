"""Training, top to bottom: set up, loop, evaluate, save. What a run consists of: run.py."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from deitfast.data import TooManyBadFiles, TrainLoader
from deitfast.distributed import start
from deitfast.engine.engine import UNCAPTURED_STEPS
from deitfast.engine.optim import learning_rate
from deitfast.errors import DeitfastError
from deitfast.model.weights import save_weights
from deitfast.recipe import Recipe
from deitfast.training.interrupt import EXIT_INTERRUPTED, StopRequest
from deitfast.training.meter import Meter
from deitfast.training.run import Run, begin, save, set_up
from deitfast.training.run_folder import duration
from deitfast.use.evaluate import Scores, evaluate_each


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    raw, ema: scores of the weights and of their average, which is None where none is kept. images_per_second: of the
    training steps. engine: how the steps ran, in words. folder: where everything lies.
    """

    step: int
    raw: Scores
    ema: Scores | None
    images_per_second: float
    engine: str
    folder: Path


def train(
    recipe: Recipe, *, stop_at: int | None = None, eval_images: int | None = None, depth: int | None = None,
    stated: Recipe | None = None,
) -> Result | None:  # fmt: skip
    """Run `recipe` on this process, one of torchrun's or the only one; resume if its run folder holds a checkpoint.

    stop_at: save and return after this step; the result is None then, unless eval_images is given.
    eval_images: evaluate on the first so many images only. depth: blocks of the model where not its own number.
    stated: the recipe as its file states it, from which deviations are told; None: the DeiT paper's.
    Raises DeitfastError for anything the user can mend; what can be checked is checked before a file is written.
    """
    recipe.check()
    run, data = set_up(recipe, depth)
    try:
        begin(run, data, stated)
        with TrainLoader(
            run.train_data,
            recipe,
            image_size=run.model.image_size,
            micro_batch=run.micro_batch,
            rank=run.world.rank,
            world_size=run.world.size,
            device=run.world.device,
            start_step=run.step,
            stop_step=run.total_steps,
            say=run.warn,
            bad_list=Path(recipe.out) / "bad.txt",
            decoder=run.decode,
        ) as loader:
            loader.count_waits_unless(run.engine.busy)
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
        run.engine.close()
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
    recipe, world, order = run.recipe, run.world, run.order
    batches = iter(loader)
    meter = Meter(recipe, world, loader, run.engine, stop, run.step, run.total_steps, order.steps_per_epoch)
    log_every = recipe.log_every or (50 if world.device.type == "cuda" else 1)
    last_step = run.total_steps if stop_at is None else min(stop_at, run.total_steps)
    saved_at, result = time.monotonic(), None
    run.model.train()

    while run.step < last_step:
        lr = learning_rate(recipe, run.step, order.steps_per_epoch)
        run.engine(batches, run.step, lr)
        run.step += 1

        # Everything that waits for the device happens at log steps, and every pause is one.
        epoch, in_epoch = divmod(run.step, order.steps_per_epoch)
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
    weights = [contextlib.nullcontext, *([run.engine.averaged] if run.recipe.ema_decay else [])]
    raw, *averaged = evaluate_each(
        run.model, weights, run.val_data, run.world, crop_ratio=run.recipe.eval_crop_ratio, batch=run.eval_batch,
        workers=run.recipe.workers, bf16=run.bf16, limit=limit, decode=run.decode,
    )  # fmt: skip
    ema = averaged[0] if averaged else None
    return Result(run.step, raw, ema, images_per_second, engine=run.engine.description, folder=Path(run.recipe.out))


def record(run: Run, result: Result) -> None:
    """Write the scores down, and the better of raw and averaged weights if they are the run's best so far."""
    if not run.folder:
        return
    epoch = run.step // run.order.steps_per_epoch
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
        save_weights(run.folder.path / "best" / "model.safetensors", tensors, metadata)


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


def smoke(recipe: Recipe) -> Result:
    """Prove an installation: three small steps of `recipe` with a save and a resume between, and an evaluation.

    Batch, epochs and evaluated images shrink, and on CPU, for fresh weights, the depth; the code that runs and all else
    of the recipe do not. The run folder is temporary. What so short a run learns says nothing, and is not printed.
    """
    world = start(recipe.device)
    begun = time.monotonic()
    out = world.share(tempfile.mkdtemp(prefix="deitfast-smoke-") if world.is_main else "")
    batch = 4 * world.size
    small = replace(
        recipe, out=out, epochs=1, warmup_epochs=0.0, batch=batch, mix_group=min(recipe.mix_group, batch // world.size),
        micro_batch=0, log_every=1, smoke=True,
    )  # fmt: skip
    depth = 2 if world.device.type == "cpu" and not recipe.init else None
    what = (
        f"{recipe.model}{f' cut to {depth} blocks' if depth else ''} on {recipe.data}, {world.size} "
        f"{world.device.type} process(es)"
    )
    saved_at = 2 if world.device.type == "cpu" else UNCAPTURED_STEPS + 2  # on a GPU both parts replay the graph
    last = 2 * saved_at - 1
    if world.is_main:
        print(f"smoke test of {what}: {last} steps, a checkpoint, an evaluation", flush=True)
    try:
        train(small, stop_at=saved_at, depth=depth)
        result = train(small, stop_at=last, eval_images=16, depth=depth)
        assert result is not None
        world.barrier()  # not in `finally`: after an error the others would wait there
        if world.is_main:
            print(
                f"smoke test passed: {what}, {duration(time.monotonic() - begun)}\n"
                f"  {result.step} steps ran with a finite loss: {result.engine}\n"
                f"  the run was saved after step {saved_at} and resumed from its checkpoint\n"
                f"  {result.raw.images} images were evaluated"
            )
        return result
    finally:
        if world.is_main:
            shutil.rmtree(out, ignore_errors=True)
