"""Checkpoints written beside the training: a copy of the state is taken, and a thread brings it to the disk.

Training waits for the copy alone, and for the write before where that is not done. A write that fails (a full disk)
is told, and training goes on: the next save tries again. Only a run that could not save for long stops.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from deitfast.errors import DeitfastError, first_line
from deitfast.training import checkpoint
from deitfast.training.checkpoint import Checkpoint

GIVE_UP_S = 3600.0
"""Seconds without one successful save after which a run stops rather than train on for nothing."""

_RETRY_S = 60.0


class Saver:
    """Writes the checkpoints of a run, one at a time. To be used from one thread.

    keep_every: of `checkpoint.save`. say: gets a line a failure. note: gets a line a checkpoint, for the log. failed:
    gets step and reason of a failure. stall: seconds that training waited for saves; saved: step of the last that is on
    disk, or None.
    """

    def __init__(
        self, folder: Path, keep_every: int, say: Callable[[str], None], note: Callable[[str], None],
        failed: Callable[[int, str], None],
    ) -> None:  # fmt: skip
        self.folder, self.keep_every = folder, keep_every
        self.say, self.note, self.failed = say, note, failed
        self.stall = 0.0
        self.saved: int | None = None
        self.failing = False
        self._last_success = self._last_try = time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[int, Future[float]] | None = None  # step, and the seconds that its write will have taken

    def due(self, seconds: float) -> bool:
        """Whether the last save that succeeded is older than `seconds`, and the last try not of this minute."""
        now = time.monotonic()
        return now - self._last_success > seconds and (not self.failing or now - self._last_try > _RETRY_S)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Copy the state and write it in the background."""
        began = time.monotonic()
        self.join()
        copied = Checkpoint(step, {stem: _copies(named) for stem, named in tensors.items()}, state)
        self._last_try = time.monotonic()
        self._writing = step, self._thread.submit(self._write, copied)
        stall = time.monotonic() - began
        self.stall += stall
        self.note(f"checkpoint of step {step}: training waited {stall:.3f} s for its copy")

    def join(self) -> None:
        """Wait for the write under way and tell how it went. Raises DeitfastError where none succeeded for long."""
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            seconds = writing.result()
        except (OSError, SafetensorError) as error:
            self._tell_failure(step, first_line(error))
        else:
            self.saved, self.failing, self._last_success = step, False, time.monotonic()
            self.note(f"checkpoint of step {step}: written in {seconds:.2f} s")

    def _tell_failure(self, step: int, reason: str) -> None:
        self.failing = True
        self.failed(step, reason)
        free = _free(self.folder)
        for_long = time.monotonic() - self._last_success
        if for_long > GIVE_UP_S:
            raise DeitfastError(
                f"no checkpoint could be written to {self.folder} for {for_long / 60:.0f} minutes: {reason}{free}. "
                f"Free space; the same command goes on from step {self.saved or 0}"
            )
        self.say(
            f"checkpoint of step {step} not written: {reason}{free}. Training goes on and tries again; "
            + (f"step {self.saved} is safe" if self.saved is not None else "earlier ones are kept")
        )

    def poll(self) -> None:
        """`join`, if that takes no time."""
        if self._writing is not None and self._writing[1].done():
            self.join()

    def _write(self, copied: Checkpoint) -> float:
        began = time.monotonic()
        checkpoint.save(self.folder, copied, self.keep_every)
        return time.monotonic() - began


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host; from a GPU by way of pinned memory, which torch keeps for the next time."""
    copied, waits = {}, False
    for name, tensor in tensors.items():
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        copied[name] = (host.pin_memory() if tensor.is_cuda else host).copy_(tensor.detach(), non_blocking=True)
        waits |= tensor.is_cuda
    if waits:
        torch.cuda.current_stream().synchronize()
    return copied


def _free(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free)"
    except OSError:
        return ""
