"""A few training steps under torch.profiler: where the time goes, as a Chrome trace and as a table."""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from deitfast.distributed import start
from deitfast.engine.engine import UNCAPTURED_STEPS
from deitfast.engine.optim import learning_rate
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.training.run import Run, set_up

_WARM_STEPS = UNCAPTURED_STEPS + 2  # compilation and capture are not what a step takes
_ROWS = 25


def profile(recipe: Recipe, out: Path, steps: int = 5) -> str:
    """Trace `steps` steps of `recipe`, as they run here, into out/trace.json and out/table.txt; the table.

    The run itself is set up in a temporary folder and left: no checkpoint, no evaluation. With several processes the
    leading one is traced. Raises DeitfastError where `out` cannot be written.
    """
    world = start(recipe.device)
    with tempfile.TemporaryDirectory(prefix="deitfast-profile-", ignore_cleanup_errors=True) as folder:
        with closing(set_up(replace(recipe, out=world.share(folder)))[0]) as run:
            text = _traced(run, out, steps)
        world.barrier()
    return text


def _traced(run: Run, out: Path, steps: int) -> str:
    activities = [ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if run.world.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        by = "self_device_time_total"
    run.model.train()
    with run.loader(_WARM_STEPS + steps) as loader:
        batches = iter(loader)

        def go(first: int, count: int) -> float:
            started = time.perf_counter()
            for step in range(first, first + count):
                run.engine(batches, step, learning_rate(run.recipe, step, run.order.steps_per_epoch))
            run.engine.pop_loss()[0].item()  # waits for the device
            return time.perf_counter() - started

        go(0, _WARM_STEPS)
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = go(_WARM_STEPS, steps)
    table = profiler.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=60)
    text = (
        f"{run.recipe.model}: {steps} steps of {run.recipe.batch} images after {_WARM_STEPS} to warm up, "
        f"{1e3 * seconds / steps:.1f} ms a step under the profiler\n{run.engine.description}\n{table}"
    )
    if run.world.is_main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(out / "trace.json"))
            (out / "table.txt").write_text(text + "\n")
        except OSError as error:
            raise DeitfastError(f"cannot write {out}: {error.strerror}. Give --profile another folder") from error
    return text
