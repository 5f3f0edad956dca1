"""Evaluations in a run: the scores of both weights, written down, and the best weights so far."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from deitfast.errors import first_line
from deitfast.model.weights import save_weights
from deitfast.training.run import Run
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


def evaluate_both(
    run: Run, images_per_second: float, limit: int | None, asked_to_stop: Callable[[], bool] | None = None
) -> Result:
    """Scores of the raw and of the averaged weights. Raises Interrupted where a process is asked to stop."""
    with run.engine.weights() as weights:
        raw, *averaged = evaluate_each(
            run.model, weights, run.val_data, run.world, crop_ratio=run.recipe.eval_crop_ratio, batch=run.eval_batch,
            workers=run.recipe.workers, bf16=run.bf16, limit=limit, decode=run.decode, asked_to_stop=asked_to_stop,
        )  # fmt: skip
    ema = averaged[0] if averaged else None
    return Result(run.step, raw, ema, images_per_second, engine=run.engine.description, folder=Path(run.recipe.out))


def record(run: Run, result: Result) -> None:
    """Write the scores down, and the better of raw and averaged weights if they are the run's best so far.

    To be called on every process.
    """
    better = result.ema if result.ema and result.ema.top1 > result.raw.top1 else result.raw
    weights = "model" if better is result.raw else "ema"
    state = run.engine.tensors(weights)[weights]
    if not run.folder:
        return
    epoch = run.step // run.order.steps_per_epoch
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
    if run.best is None or better.top1 > run.best["top1"]:
        best = {"top1": better.top1, "epoch": epoch, "weights": "raw" if better is result.raw else "ema"}
        metadata = {
            "model": run.recipe.model,
            "image_size": str(run.model.image_size),
            "eval_crop_ratio": str(run.recipe.eval_crop_ratio),
            "classes": json.dumps(run.val_data.classes),
            **{key: str(value) for key, value in best.items()},
        }
        try:
            save_weights(run.folder.path / "best" / "model.safetensors", state, metadata)
            run.best = best
        except (OSError, SafetensorError) as error:  # the best ones of before stay, and so does their score
            run.faults.add("failed save", run.step, what=first_line(error))
            run.say(f"the best weights so far could not be written: {first_line(error)}. Training goes on")
