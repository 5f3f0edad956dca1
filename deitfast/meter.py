"""Loss and speed between log steps: accumulated on the device, read at log steps only."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.report import RunFolder, duration

if TYPE_CHECKING:
    from deitfast.data import TrainLoader


class Meter:
    """Averages over the steps since the last log, and the progress line made of them."""

    def __init__(
        self, recipe: Recipe, world: World, loader: TrainLoader, step: int, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.recipe, self.world, self.loader = recipe, world, loader
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.loss_sum = torch.zeros((), device=world.device)
        self.logged_step, self.first_step = step, step
        self.training_seconds = 0.0
        self.resume()

    def add(self, loss: Tensor) -> None:
        """One micro-batch's share of a step's loss on this process, fp32 scalar on the device."""
        self.loss_sum += loss

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

        Raises DeitfastError if the loss is no longer finite.
        """
        steps = step - self.logged_step
        loss = self.world.sum(self.loss_sum).item() / (self.world.size * steps)
        seconds = time.monotonic() - self.window_start
        waiting = (self.loader.seconds_waiting - self.waited_before) / max(seconds, 1e-9)
        self.loss_sum.zero_()
        self.logged_step = step
        self.training_seconds += seconds
        self.resume()
        if not math.isfinite(loss):
            message = f"loss is {loss} at step {step}. Lower --lr, or give --clip-norm 1; the last checkpoint is whole"
            raise DeitfastError(message if self.world.leads else "")
        if folder is None:
            return
        speed = steps * self.recipe.batch / seconds
        epoch = step / self.steps_per_epoch
        folder.metrics(
            step=step, epoch=round(epoch, 4), loss=loss, lr=lr, images_per_second=round(speed, 2),
            data_wait=round(waiting, 4),
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
        )
