"""Checkpoints written beside the training: a copy of the state is taken, and a thread brings it to the disk.

Training waits for the copy alone, and for the write before where that is not done. A write that fails (a full disk)
is told, and training goes on: the next save tries again. Only a run that could not save for long stops.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from deitfast.errors import DeitfastError, first_line
from deitfast.training import checkpoint
from deitfast.training.checkpoint import Checkpoint, Retention

GIVE_UP_S = 3600.0
"""Seconds without one successful save after which a run stops rather than train on for nothing."""

_RETRY_S = 60.0


class Saver:
    """Writes the checkpoints of a run, one at a time. To be used from one thread.

    say: gets a line a failure. note: gets a line a checkpoint, for the log. failed: gets step and reason of a failure.
    stall: seconds that training waited for saves; saved: step of the last that is on disk, or None.
    """

    def __init__(
        self, folder: Path, retention: Retention, say: Callable[[str], None], note: Callable[[str], None],
        failed: Callable[[int, str], None],
    ) -> None:  # fmt: skip
        self.folder, self.retention = folder, retention
        self.say, self.note, self.failed = say, note, failed
        self.stall = 0.0
        self.saved: int | None = None
        self.failing = False
        self._last_success = self._last_try = time.monotonic()
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, float, Exception | None] | None = None  # step, seconds, error

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
        self._thread = threading.Thread(target=self._write, args=(copied,), name="checkpoint", daemon=True)
        self._thread.start()
        stall = time.monotonic() - began
        self.stall += stall
        self.note(f"checkpoint of step {step}: training waited {stall:.3f} s for its copy")

    def join(self) -> None:
        """Wait for the write under way and tell how it went. Raises DeitfastError where none succeeded for long."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        assert self._outcome is not None
        step, seconds, error = self._outcome
        if error is None:
            self.saved, self.failing, self._last_success = step, False, time.monotonic()
            self.note(f"checkpoint of step {step}: written in {seconds:.2f} s")
            return
        if not isinstance(error, (OSError, SafetensorError)):
            raise error
        self.failing = True
        reason = first_line(error)
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
        if self._thread is not None and not self._thread.is_alive():
            self.join()

    def _write(self, copied: Checkpoint) -> None:
        began = time.monotonic()
        error: Exception | None = None
        try:
            checkpoint.save(self.folder, copied, self.retention)
        except Exception as raised:  # told by `join`, in the thread that trains
            error = raised
        self._outcome = copied.step, time.monotonic() - began, error


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
