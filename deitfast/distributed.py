"""Processes and reductions, thin over torch.distributed; one process needs no process group."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deitfast.compiler import check_compiler
from deitfast.errors import EXIT_HOPELESS, DeitfastError, HopelessError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's numbering."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and speaks."""
        return self.rank == 0

    def wants_bf16(self, precision: str) -> bool:
        """Whether `precision` (bf16, fp32 or auto) means bf16 here: auto does on a GPU."""
        return precision == "bf16" or (precision == "auto" and self.device.type == "cuda")

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, value: T) -> T:
        """The leading process's `value` (any picklable object) on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on one process a machine first, then on the others, which find its files made.

        If it raises DeitfastError anywhere, it does so everywhere, and only one process's error carries the message.
        """
        result: T | None = None
        error: DeitfastError | None = None
        for turn in (True, False):
            if (self.local_rank == 0) == turn and error is None:
                try:
                    result = action()
                except DeitfastError as raised:
                    error = raised
            codes = self.gather(error.exit_code if error else 0)
            if any(codes):
                speaker = next(i for i, code in enumerate(codes) if code)
                if error and self.rank == speaker:
                    raise error
                raise HopelessError("") if codes[speaker] == EXIT_HOPELESS else DeitfastError("")
        return result  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every process's `value` (any picklable object), by rank, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def start(device: str = "auto") -> World:
    """Join the processes torchrun started, or be the only one. device: cuda, cpu, or auto."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeitfastError(
                f"process {local_rank} has no GPU: this machine has {torch.cuda.device_count()}. "
                "Start fewer processes, or give --device cpu"
            )
        check_compiler()
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=where if device == "cuda" else None)
    return World(rank, size, local_rank, local_size, where)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when torchrun dies: an orphan would train on and fight over the run folder."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)
