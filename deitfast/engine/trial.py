"""Can a run's step be captured here? Asked of a process of its own, because a capture that fails may spoil its process.

Two blocks of the run's model take the run's own step on random images: uncaptured, and captured and replayed. Capture
must succeed, and the losses of the first two replays must be the uncaptured steps'. Collectives are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from deitfast.data.batch import Batch
from deitfast.distributed import World
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import UNCAPTURED_STEPS, make_engine
from deitfast.engine.teacher import load_teacher
from deitfast.errors import first_line
from deitfast.model.factory import model_of
from deitfast.recipe import Recipe
from deitfast.verification import process
from deitfast.verification.process import ProcessEnded
from deitfast.verification.verdict import Verdict, machine, remembered
from deitfast.verification.verify import adopt

_BLOCKS, _REPLAYS = 2, 2
_SAME = 1e-5
"""Relative difference of two losses up to which they are one: the order of a sum of fp32."""
_UNCONCERNED = {
    "data", "init", "reset_head", "out", "eval_every", "eval_crop_ratio", "workers", "decode", "bad_limit", "log_every",
    "save_minutes", "allow_changes", "epochs", "device",
}  # fmt: skip


def capture_problem(
    recipe: Recipe, classes: list[str], image_size: int, micro_batch: int, accumulation: int, bf16: bool,
    verdict: Verdict, device: torch.device,
) -> str:  # fmt: skip
    """Why the step of a run is not to be captured on `device`, a GPU; empty where it is."""
    told = {name: value for name, value in asdict(recipe).items() if name not in _UNCONCERNED}
    job = {
        "recipe": told, "classes": classes, "image_size": image_size, "micro_batch": micro_batch,
        "accumulation": accumulation, "bf16": bf16, "forms": verdict.forms,
        "launches": {op.op: op.launches for op in verdict.ops},
    }  # fmt: skip

    def find() -> dict[str, Any]:
        try:
            return next(process.answers(__name__, {**job, "verdict": verdict.record(), "device": str(device)}))
        except (ProcessEnded, StopIteration) as end:
            return {"problem": f"a trial of it ended: {first_line(end)}"}

    return str(remembered({"trial": job, **machine(device)}, find, keeps=lambda _: True)["problem"])


def work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `capture_problem` has done in another process."""
    device = torch.device(job["device"])
    torch.cuda.set_device(device)
    adopt(Verdict.of(job["verdict"]))
    try:
        plain, captured = (losses(job, engine, device) for engine in ("flat", "graph"))
    except torch.OutOfMemoryError:
        yield {"problem": ""}  # says nothing of captures; the run itself will tell if it does not fit
    except RuntimeError as error:
        yield {"problem": f"{type(error).__name__}: {first_line(error)}"}
    else:
        yield {"problem": difference(plain, captured)}


def difference(plain: list[float], captured: list[float]) -> str:
    """How the losses of replayed steps differ from those of the same steps uncaptured, in words; empty where not."""
    pairs = list(zip(plain, captured, strict=True))
    if all(abs(a - b) <= _SAME * abs(a) for a, b in pairs):
        return ""
    found = " and ".join(f"{b:.6f} instead of {a:.6f}" for a, b in pairs)
    return f"replayed steps have the losses {found}"


def losses(job: dict[str, Any], engine_name: str, device: torch.device) -> list[float]:
    """Of the two steps that follow those which are never captured."""
    recipe = replace(Recipe(**job["recipe"]), engine=engine_name)
    torch.manual_seed(recipe.seed)
    model = model_of(recipe, job["classes"], _BLOCKS).to(device)
    teacher = None
    if recipe.distillation != "none":
        teacher = load_teacher(recipe, job["classes"], device, job["image_size"])
    engine = make_engine(
        model, recipe, World(0, 1, 0, device), DropPath(model, recipe, job["micro_batch"]),
        accumulation=job["accumulation"], bf16=job["bf16"], teacher=teacher,
        class_weights=torch.ones(len(job["classes"]), device=device) if recipe.class_weights == "balanced" else None,
    )  # fmt: skip
    found = []
    source = _batches(job["micro_batch"], job["image_size"], len(job["classes"]), device)
    for step in range(UNCAPTURED_STEPS + _REPLAYS):
        engine(source, step, recipe.lr)
        found.append(engine.pop_loss()[0].item())
    engine.close()
    return found[UNCAPTURED_STEPS:]


def _batches(size: int, side: int, classes: int, device: torch.device) -> Iterator[Batch]:
    """Random images with random labels, the same in every call."""
    generator = torch.Generator(device).manual_seed(0)
    random: dict[str, Any] = {"generator": generator, "device": device}
    rows, boxes = torch.arange(size, device=device), torch.zeros(size, 4, dtype=torch.int64, device=device)
    for step in range(1 << 30):
        yield Batch(
            images=torch.randint(256, (size, side, side, 3), dtype=torch.uint8, **random),
            labels=torch.randint(classes, (size,), **random),
            index=rows, view=torch.zeros_like(rows), epoch=torch.zeros_like(rows[:1]),
            erase=boxes, lam=torch.rand(size // 2 + 1, **random).repeat_interleave(2)[:size], mix_box=boxes,
            step=step, slots=np.arange(size),
        )  # fmt: skip
