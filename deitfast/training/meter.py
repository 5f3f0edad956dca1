"""Loss and speed between log steps: accumulated on the device, read at log steps only."""

from __future__ import annotations

import math
import time

import numpy as np
import torch

from deitfast.data import TooManyBadFiles, TrainLoader
from deitfast.training.resume import Diverged
from deitfast.training.run import Run
from deitfast.training.run_folder import duration


class Meter:
    """Averages over the steps since the last log, and the progress line made of them."""

    def __init__(self, run: Run, loader: TrainLoader) -> None:
        self.run, self.loader = run, loader
        self.recipe, self.world, self.engine = run.recipe, run.world, run.engine
        self.skipped = self.bad_files = 0  # of all processes, since the start of this one
        self.logged_step = self.first_step = run.step
        self.training_seconds = 0.0
        self.save_due = False  # by the clock of the leading process, as all of them know since the last log
        self.all_skipped = False  # every step of the last window
        self.resume()

    def resume(self) -> None:
        """Start the clock again after a pause (evaluation, saving) that is not training time."""
        self.window_start = time.monotonic()
        self.waited_before = self._waited()

    def _waited(self) -> torch.Tensor:
        """Host seconds blocked so far on data, and on other processes: fp64 (2,)."""
        return torch.tensor([self.loader.seconds_waiting, self.engine.seconds_for_others], dtype=torch.float64)

    @property
    def images_per_second(self) -> float:
        """Images of all processes over training time since the start of this process."""
        return (self.logged_step - self.first_step) * self.recipe.batch / max(self.training_seconds, 1e-9)

    def log(self, lr: float) -> None:
        """Close the window: a line of metrics.jsonl and the progress line. Waits for the device.

        Raises Diverged if the loss is no longer finite and after ten skipped steps in a row, and TooManyBadFiles if
        the processes together met more unreadable images than the recipe allows.
        """
        run, step, before = self.run, self.run.step, self.logged_step
        steps = step - before
        seconds = time.monotonic() - self.window_start
        loss_sum, skipped_steps = self.engine.pop_loss()
        waits = (self._waited() - self.waited_before) / max(seconds, 1e-9)
        due = run.saver is not None and run.saver.due(60 * self.recipe.save_minutes)
        own = loss_sum.new_tensor([len(self.loader.quarantined), due, *waits.tolist()])
        of_all = loss_sum.new_zeros(self.world.size, 2 + len(own))  # a row a process
        of_all[self.world.rank] = torch.cat([torch.stack([loss_sum, skipped_steps / self.world.size]), own])
        of_all = self.world.sum(of_all).cpu()
        loss, skipped_share, bad, dues = of_all[:, :4].sum(0).tolist()
        data_waits, peer_waits = of_all[:, 4:].T.tolist()
        skipped, self.save_due = round(skipped_share), dues > 0
        self.all_skipped = skipped == steps
        if bad:  # the same file may have met several processes
            met = len({name for names in self.world.gather(self.loader.quarantined) for name, _ in names})
            if run.folder and met > self.bad_files:
                run.faults.add("bad files", step, count=met - self.bad_files)
            self.bad_files = met
        if skipped and run.folder:
            run.faults.add("skipped steps", step, count=skipped)
        loss /= max(steps - skipped, 1)
        self.skipped += skipped
        seconds = time.monotonic() - self.window_start
        self.logged_step = step
        self.training_seconds += seconds
        self.resume()
        self._check(step, before, loss)
        if run.folder:
            self._write(lr, {"loss": loss} if skipped < steps else {}, steps / seconds, data_waits, peer_waits)

    def _write(
        self, lr: float, loss: dict[str, float], steps_per_second: float, waits: list[float], peer_waits: list[float]
    ) -> None:
        """The lines of a window. waits: by process, share of the window in which it waited for data; for others."""
        run, folder, step, best = self.run, self.run.folder, self.run.step, self.run.best
        assert folder
        speed, epoch = steps_per_second * self.recipe.batch, step / run.order.steps_per_epoch
        stall = round(run.saver.stall, 3) if run.saver else 0.0
        waiting = max(waits)
        by_process = {}
        if len(waits) > 1:
            by_process = {"data_waits": np.round(waits, 4).tolist(), "peer_waits": np.round(peer_waits, 4).tolist()}
        memory, held = "", {}
        if self.world.device.type == "cuda":
            used = torch.cuda.max_memory_reserved()
            total = torch.cuda.get_device_properties(self.world.device).total_memory
            memory = f" mem {used / 2**30:.0f}/{total / 2**30:.0f}G"
            held = {"memory_gib": round(used / 2**30, 2)}
        folder.metrics(
            step=step, epoch=round(epoch, 4), **loss, lr=lr, images_per_second=round(speed, 2),
            data_wait=round(waiting, 4), **by_process, save_stall=stall, skipped=self.skipped, bad_files=self.bad_files,
            **held,
        )  # fmt: skip
        slowest = f" (process {waits.index(waiting)})" if len(waits) > 1 and waiting > 0.05 else ""
        if (longest := max(peer_waits)) - min(peer_waits) > 0.05:  # whoever waits least is waited for
            slowest += f", {100 * longest:.0f}% for process {peer_waits.index(min(peer_waits))}"
        faults = run.faults.summary()
        remaining = (run.total_steps - step) * self.recipe.batch / max(self.images_per_second, 1e-9)
        done = 100 * step / run.total_steps
        accuracy = f" | top1 {best['top1']:.1f}@{best['epoch']}" if best else ""
        folder.progress(
            f"ep {math.ceil(epoch)}/{self.recipe.epochs} step {step}/{run.total_steps} {done:.1f}% "
            f"| loss {loss.get('loss', math.nan):.3f} lr {lr:.1e} "
            f"| {speed:.0f} img/s wait {100 * waiting:.1f}%{slowest}{memory}{accuracy} "
            f"| eta {duration(remaining)}"
            + (f" | skip {self.skipped}" if self.skipped else "")
            + (f" | bad files {self.bad_files}" if self.bad_files else "")
            + (f" | faults: {faults}" if faults else "")
        )

    def _check(self, step: int, before: int, loss: float) -> None:
        """Raise for a run that should not go on: on every process, the message on the leading one."""
        limit = self.recipe.bad_limit * len(self.loader.manifest)
        told = ""
        if not math.isfinite(loss):
            told = f"loss is {loss} at step {step}. Lower --lr, or give --clip-norm 1"
        elif self.engine.should_stop():
            told = (
                f"ten steps in a row had gradients that are not finite and were skipped, up to step {step}. Lower "
                "--lr, or give --clip-norm 1; the weights are still finite"
            )
            before -= 9
        if told:
            raise Diverged(told if self.world.is_main else "", step, max(before, 0))
        if self.world.size > 1 and self.bad_files > limit:
            told = (
                f"{self.bad_files} of {len(self.loader.manifest)} images turned out unreadable. Fix them "
                "(`deitfast data check` lists them), or raise --bad-limit"
            )
            raise TooManyBadFiles(told if self.world.is_main else "")
