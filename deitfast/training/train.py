"""Training, top to bottom: set up, loop, evaluate, save. What a run consists of: run.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from deitfast.data import TooManyBadFiles, TrainLoader
from deitfast.distributed import board, start
from deitfast.engine.engine import UNCAPTURED_STEPS
from deitfast.engine.optim import learning_rate
from deitfast.errors import EXIT_INTERRUPTED, DeitfastError, HopelessError, first_line
from deitfast.guard import restarts_left, trains
from deitfast.recipe import Recipe
from deitfast.training.evaluation import Result, evaluate_both, record
from deitfast.training.interrupt import Agreement, StopRequest
from deitfast.training.meter import Meter
from deitfast.training.resume import Diverged, begin, is_saved, roll_back, save
from deitfast.training.run import Run, set_up
from deitfast.training.run_folder import duration
from deitfast.training.watch import Watch
from deitfast.use.evaluate import Interrupted


def train(
    recipe: Recipe, *, stop_at: int | None = None, eval_images: int | None = None, depth: int | None = None,
    stated: Recipe | None = None, quiet: bool = False, stage: Path | None = None,
    track: Sequence[str] = (),
) -> Result | None:  # fmt: skip
    """Run `recipe` on this process, one of torchrun's or the only one; resume if its run folder holds a checkpoint.

    stop_at: save and return after this step; the result is None then, unless eval_images is given.
    eval_images: evaluate on the first so many images only. depth: blocks of the model where not its own number.
    stated: the recipe as its file states it, from which deviations are told; None: the DeiT paper's.
    quiet: what is said goes to log.txt alone. stage: folder on a disk of this machine to which the data is copied.
    track: names of `trackers.TRACKERS` that get the lines of metrics.jsonl, too.
    Raises DeitfastError for anything the user can mend; what can be checked is checked before a file is written.
    """
    trains()
    recipe.check()
    with StopRequest() as stop:
        run, data = set_up(recipe, depth, quiet, stage)
        try:
            begin(run, data, stated, track)
            result = _until_done(run, stop, stop_at, eval_images)
            if result is None and run.step == run.total_steps:  # resumed after the last step
                result = evaluate_both(run, 0.0, eval_images)
            if result and run.step == run.total_steps:
                conclude(run, result)
        except Exception as error:
            if not isinstance(error, DeitfastError):  # a crash, of which the next start is told
                run.faults.add("error", run.step, f"{type(error).__name__}: {first_line(error)}"[:500])
                run.died = True
            raise
        finally:
            run.close()
        run.world.barrier()
    return result


def _until_done(run: Run, stop: StopRequest, stop_at: int | None, eval_images: int | None) -> Result | None:
    """The loop, and once more from an earlier checkpoint where the run diverges."""
    diverged: Diverged | None = None
    while True:
        try:
            return _with_loader(run, stop, stop_at, eval_images)
        except Diverged as error:
            if diverged and error.step <= diverged.step + run.order.steps_per_epoch:
                told = f"{error} This is the second time: not again" if run.folder else ""
                raise HopelessError(told) from error
            roll_back(run, error)
            diverged = error


def _with_loader(run: Run, stop: StopRequest, stop_at: int | None, eval_images: int | None) -> Result | None:
    with run.loader(run.total_steps) as loader:
        loader.count_waits_unless(run.engine.busy)
        watch = Watch(
            board(), run.world.rank, run.world.size, run.step, patience=run.recipe.patience,
            restarts=restarts_left() > 0, say=run.say, fault=run.faults.add,
        )  # fmt: skip
        try:
            return loop(run, loader, stop, watch, stop_at, eval_images)
        except TooManyBadFiles:
            save(run, watch, wait=True)
            raise
        except torch.OutOfMemoryError as error:
            raise out_of_memory(run) from error
        finally:
            watch.close()


def loop(
    run: Run, loader: TrainLoader, stop: StopRequest, watch: Watch, stop_at: int | None, eval_images: int | None
) -> Result | None:
    """Every step from `run.step` on; the last evaluation's result. See `train`.

    Raises SystemExit(75) after saving, once the processes have agreed that one of them got a signal.
    """
    recipe, world = run.recipe, run.world
    batches = watch.fed(iter(loader))
    meter = Meter(run, loader)
    agreement = Agreement(stop, board(), world.rank, run.step)
    log_every = recipe.log_every or (50 if world.device.type == "cuda" else 1)
    last_step = run.total_steps if stop_at is None else min(stop_at, run.total_steps)
    result = None
    stop.begin()
    run.model.train()
    if run.evaluation_due and run.evaluated != run.step:  # interrupted in it
        result = pause_to_evaluate(run, meter, watch, agreement, eval_images)
        pause_to_save(run, watch)
        meter.resume()

    while run.step < last_step:
        lr = learning_rate(recipe, run.step, run.order.steps_per_epoch)
        run.engine(batches, run.step, lr)
        run.step += 1
        run.reached()
        watch.stepped(run.step)

        # Everything that waits for the device happens at log steps, and every pause is one.
        signal = agreement.decided(run.step)
        epoch_ended, stopping = run.step % run.order.steps_per_epoch == 0, run.step == last_step
        if not (run.step % log_every == 0 or epoch_ended or stopping or signal):
            continue
        meter.log(lr)
        if signal:
            leave(run, signal, watch, stop)
        if run.evaluation_due or (stopping and eval_images):
            result = pause_to_evaluate(run, meter, watch, agreement, eval_images)
        # No save of steps that were all skipped: it would push out the one to which a run that diverges goes back.
        if stopping or ((epoch_ended or meter.save_due) and not meter.all_skipped):
            pause_to_save(run, watch, last=stopping)
        meter.resume()
    return result


def pause_to_evaluate(run: Run, meter: Meter, watch: Watch, agreement: Agreement, limit: int | None) -> Result:
    """Evaluate and write it down; a signal in between is followed at the next batch."""

    def asked_to_stop() -> bool:
        watch.alive()
        return agreement.wanted() is not None

    try:
        with watch.during("an evaluation"):
            result = evaluate_both(run, meter.images_per_second, limit, asked_to_stop)
    except Interrupted:
        leave(run, agreement.wanted() or "a signal to another process", watch, agreement.stop)
    run.evaluated = run.step
    record(run, result)
    return result


def pause_to_save(run: Run, watch: Watch, *, last: bool = False) -> None:
    """last: the run is finished; raises DeitfastError where its state is not on the disk then."""
    save(run, watch, wait=last)
    if last and not is_saved(run):
        assert run.saver
        raise DeitfastError(
            f"the last checkpoint could not be written. The same command goes on from step {run.saver.saved or 0}"
        )
    run.reached()


def leave(run: Run, signal: str, watch: Watch, stop: StopRequest) -> NoReturn:
    """Save and end, as a signal asked for."""
    save(run, watch, wait=True)
    run.reached(running=False)
    stop.end()
    if run.folder:
        done = f"saved at step {run.step}" if is_saved(run) else f"NOT saved at step {run.step}"
        run.say(f"{signal}: {done}. The same command resumes")
    run.world.barrier()
    raise SystemExit(EXIT_INTERRUPTED)


def out_of_memory(run: Run) -> DeitfastError:
    """What to say when the GPU's memory did not suffice."""
    device = run.world.device
    free, total = (x / 2**30 for x in torch.cuda.mem_get_info(device))
    unit, share = run.recipe.unit, run.micro_batch * run.accumulation
    smaller = max((m for m in range(unit, run.micro_batch, unit) if share % m == 0), default=0)
    remedy = f"Try --micro-batch {smaller}, or --recompute" if smaller else "Give --recompute, or use a larger GPU"
    return DeitfastError(
        f"out of memory at micro-batch {run.micro_batch} ({total - free:.1f} of {total:.1f} GB in use). {remedy}"
    )


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
    batch = 4 * world.size
    small = replace(
        recipe, epochs=1, warmup_epochs=0.0, batch=batch, mix_group=min(recipe.mix_group, batch // world.size),
        micro_batch=0, log_every=1,
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
    with tempfile.TemporaryDirectory(prefix="deitfast-smoke-", ignore_cleanup_errors=True) as folder:
        small = replace(small, out=world.share(folder))
        train(small, stop_at=saved_at, depth=depth, quiet=True)
        result = train(small, stop_at=last, eval_images=batch, depth=depth, quiet=True)
        assert result is not None
        world.barrier()
    if world.is_main:
        print(
            f"smoke test passed: {what}, {duration(time.monotonic() - begun)}\n"
            f"  {result.step} steps ran with a finite loss: {result.engine}\n"
            f"  the run was saved after step {saved_at} and resumed from its checkpoint\n"
            f"  {result.raw.images} images were evaluated"
        )
    return result
