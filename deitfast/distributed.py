"""Processes and reductions, thin over torch.distributed; one process needs no process group."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from deitfast.compiler import check_compiler
from deitfast.errors import DeitfastError
from deitfast.guard import WIRE

T = TypeVar("T")
SET_UP_PATIENCE = timedelta(hours=12)
"""How long the processes wait for one that scans a data set, or loads it from far away."""
TRAINING_PATIENCE = timedelta(minutes=10)
"""How long they wait in a collective on tensors, after which the missing one is taken for dead."""
_WIRES = {"": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
_LONGEST_NAP_S = 0.25
# torch 2.13 renamed both.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_PR_SET_PDEATHSIG = 1
_boards = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among all: torchrun's numbering. wire: dtype in which gradients are summed over the processes."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    wire: torch.dtype = torch.float32

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

    def broadcast(self, tensor: Tensor) -> None:
        """The leading process's values in `tensor` on every process."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def sum_to_shares(self, whole: Tensor, share: Tensor) -> Any:
        """Begin to sum every process's `whole` (n x size,), of which rank r gets part r in `share` (n,); the work.

        Gloo has no such collective of its own: it sums the whole on every process and keeps a part.
        """
        return _reduce_scatter(share, whole, async_op=True)

    def gather_shares(self, share: Tensor, whole: Tensor) -> None:
        """Every process's `share` (n,) in `whole` (n x size,), by rank, on every process."""
        _all_gather(whole, share)

    def collect(self, share: Tensor, whole: Tensor | None) -> None:
        """Every process's `share` (n,) in the leading one's `whole` (n x size,), by rank; None on the others."""
        dist.gather(share, None if whole is None else list(whole.chunk(self.size)))

    def share(self, value: T) -> T:
        """The leading process's `value` (any picklable object) on every process."""
        return self._exchange(value, [0])[0]

    def gather(self, value: T) -> list[T]:
        """Every process's `value` (any picklable object), by rank, on every process."""
        return self._exchange(value, range(self.size))

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on one process a machine first, then on the others, which find its files made.

        Where it raises anywhere, it does everywhere: DeitfastError, of which one process's carries the message; any
        other error comes out where it happened, with its traceback, and elsewhere as a DeitfastError without a message.
        """
        result: T
        problem: Exception | None = None
        for turn in (True, False):
            if (self.local_rank == 0) == turn and problem is None:
                try:
                    result = action()
                except Exception as raised:
                    problem = raised
            codes = self.gather(0 if problem is None else getattr(problem, "exit_code", 1))
            if any(codes):
                speaker = next(rank for rank, code in enumerate(codes) if code)
                if problem is not None and (self.rank == speaker or not isinstance(problem, DeitfastError)):
                    raise problem
                silent = DeitfastError("")
                silent.exit_code = codes[speaker]
                raise silent
        return result

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` gives on the leading process, which alone runs it, on every process. Raises as `agree` does."""
        return self.share(self.agree(lambda: action() if self.is_main else None))  # type: ignore[return-value]

    def _exchange(self, value: Any, speakers: Sequence[int]) -> list[Any]:
        """What the processes `speakers` put in, on every process.

        By way of the store in which they met, which takes no GPU and no collective's patience.
        """
        if self.size == 1:
            return [value]
        store = dist.distributed_c10d._get_default_store()
        turn = store.add(f"deitfast/turn/{self.rank}", 1)  # the processes do this in the same order
        names = {rank: f"deitfast/{turn}/{rank}" for rank in speakers}
        if self.rank in names:
            store.set(names[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes are fine
        nap, deadline = 1e-3, time.monotonic() + SET_UP_PATIENCE.total_seconds()
        while not store.check(list(names.values())):  # not wait(), which keeps the store from NCCL's threads
            if time.monotonic() > deadline:
                missing = [str(rank) for rank, name in names.items() if not store.check([name])]
                raise DeitfastError(f"process {', '.join(missing)} has not answered for {SET_UP_PATIENCE}")
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP_S)
        found = [pickle.loads(store.get(name)) for name in names.values()]
        if store.add(f"deitfast/{turn}/read", 1) == self.size:
            for name in (*names.values(), f"deitfast/{turn}/read"):
                store.delete_key(name)
        return found


def start(device: str = "auto") -> World:
    """Join the processes torchrun started, or be the only one. device: cuda, cpu, or auto."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
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
    wire = os.environ.get(WIRE, "")
    if wire not in _WIRES:
        raise DeitfastError(f"{WIRE} is {wire!r}, must be fp32 or bf16")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            device_id=where if device == "cuda" else None,
            timeout=TRAINING_PATIENCE,
        )
    return World(rank, size, local_rank, where, _WIRES[wire])


def board() -> dist.Store | None:
    """An empty board of small messages between the processes, over the store in which they met: no device, no
    collective. None for a process that is alone; all call this in the same order.

    What a run before it on the same processes posted, or this one before it was rolled back, is not on it. One object
    is for one thread, because a waiting call blocks the others of its connection; a `clone` has its own.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.PrefixStore(f"deitfast/board/{next(_boards)}", dist.distributed_c10d._get_default_store())


def posted(board: dist.Store | None, key: str) -> str | None:
    """What lies there on the board; None where nothing does."""
    return board.get(key).decode() if board is not None and board.check([key]) else None


def _die_with_parent() -> None:
    """Ask Linux to kill this process when torchrun dies: an orphan would train on and fight over the run folder."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request took effect
        os.kill(os.getpid(), signal.SIGKILL)
