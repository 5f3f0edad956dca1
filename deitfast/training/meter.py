"""Loss and speed between log steps: accumulated on the device, read at log steps only."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from deitfast.data import TooManyBadFiles
from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.training.interrupt import StopRequest
from deitfast.training.run_folder import RunFolder, duration

if TYPE_CHECKING:
    from deitfast.data import TrainLoader
    from deitfast.engine.engine import Engine


class Meter:
    """Averages over the steps since the last log, and the progress line made of them."""

    def __init__(
        self, recipe: Recipe, world: World, loader: TrainLoader, engine: Engine, stop: StopRequest, step: int,
        total_steps: int, steps_per_epoch: int,
    ) -> None:  # fmt: skip
        self.recipe, self.world, self.loader, self.engine, self.stop = recipe, world, loader, engine, stop
        self.asked_to_stop = False  # whether some process had a SIGTERM, as all of them know since the last log
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.skipped = self.bad_files = 0  # of all processes, since the start of this one
        self.logged_step, self.first_step = step, step
        self.training_seconds = 0.0
        self.resume()

    def resume(self) -> None:
        """Start the clock again after a pause (evaluation, saving) that is not training time."""
        self.window_start = time.monotonic()
        self.waited_before = self.loader.seconds_waiting

    @property
    def images_per_second(self) -> float:
        """Images of all processes over training time since the start of this process."""
        return (self.logged_step - self.first_step) * self.recipe.batch / max(self.training_seconds, 1e-9)

    def log(self, step: int, lr: float, folder: RunFolder | None, best: dict[str, Any] | None) -> None:
        """Close the window: a line of metrics.jsonl and the progress line. Waits for the device.

        Raises DeitfastError if the loss is no longer finite, after ten skipped steps in a row, and TooManyBadFiles if
        the processes together met more unreadable images than the recipe allows.
        """
        steps = step - self.logged_step
        loss_sum, skipped_steps = self.engine.pop_loss()
        counts = torch.tensor([len(self.loader.quarantined), self.stop.received], dtype=loss_sum.dtype)
        sums = self.world.sum(
            torch.cat([torch.stack([loss_sum, skipped_steps / self.world.size]), counts.to(loss_sum.device)])
        ).tolist()
        skipped, self.asked_to_stop = round(sums[1]), sums[3] > 0
        if sums[2]:  # the same file may have met several processes
            self.bad_files = len({name for names in self.world.gather(self.loader.quarantined) for name, _ in names})
        loss = sums[0] / max(steps - skipped, 1)
        self.skipped += skipped
        seconds = time.monotonic() - self.window_start
        waiting = (self.loader.seconds_waiting - self.waited_before) / max(seconds, 1e-9)
        self.logged_step = step
        self.training_seconds += seconds
        self.resume()
        self._check(step, loss)
        if folder is None:
            return
        speed = steps * self.recipe.batch / seconds
        epoch = step / self.steps_per_epoch
        values: dict[str, float] = {"loss": loss} if skipped < steps else {}
        folder.metrics(
            step=step, epoch=round(epoch, 4), **values, lr=lr, images_per_second=round(speed, 2),
            data_wait=round(waiting, 4), skipped=self.skipped, bad_files=self.bad_files,
        )  # fmt: skip
        remaining = (self.total_steps - step) * self.recipe.batch / max(self.images_per_second, 1e-9)
        memory = ""
        if self.world.device.type == "cuda":
            used, total = (
                torch.cuda.max_memory_reserved(),
                torch.cuda.get_device_properties(self.world.device).total_memory,
            )
            memory = f" mem {used / 2**30:.0f}/{total / 2**30:.0f}G"
        done = 100 * step / self.total_steps
        accuracy = f" | top1 {best['top1']:.1f}@{best['epoch']}" if best else ""
        folder.progress(
            f"ep {math.ceil(epoch)}/{self.recipe.epochs} step {step}/{self.total_steps} {done:.1f}% "
            f"| loss {loss:.3f} lr {lr:.1e} | {speed:.0f} img/s wait {100 * waiting:.1f}%{memory}{accuracy} "
            f"| eta {duration(remaining)}"
            + (f" | skip {self.skipped}" if self.skipped else "")
            + (f" | bad files {self.bad_files}" if self.bad_files else "")
        )

    def _check(self, step: int, loss: float) -> None:
        """Raise for a run that should not go on: on every process, the message on the leading one."""
        problem: DeitfastError | None = None
        limit = self.recipe.bad_limit * len(self.loader.manifest)
        if not math.isfinite(loss):
            problem = DeitfastError(
                f"loss is {loss} at step {step}. Lower --lr, or give --clip-norm 1; the last checkpoint is whole"
            )
        elif self.engine.should_stop():
            problem = DeitfastError(
                f"ten steps in a row had gradients that are not finite and were skipped, up to step {step}. Lower "
                "--lr, or give --clip-norm 1; the weights are still finite and the last checkpoint is whole"
            )
        elif self.world.size > 1 and self.bad_files > limit:
            problem = TooManyBadFiles(
                f"{self.bad_files} of {len(self.loader.manifest)} images turned out unreadable. Fix them "
                "(`deitfast data check` lists them), or raise --bad-limit"
            )
        if problem:
            raise problem if self.world.is_main else type(problem)("")
