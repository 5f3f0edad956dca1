"""The sum of the gradient over all processes, while the backward still computes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from deitfast.distributed import World
from deitfast.engine.flat import FlatState

_BUCKETS = 8  # parts of the flat gradient that are reduced while the backward still runs


class Reduction:
    """Sums the flat gradient over all processes, a part at a time, while the backward still computes the others.

    The buffer is cut into `_BUCKETS` runs of whole parameters. When autograd has the last gradient of a run,
    its all-reduce starts; `wait` ends the step's.
    """

    def __init__(self, flat: FlatState, world: World) -> None:
        self.flat, self.world = flat, world
        share = -(-flat.grad.numel() // _BUCKETS)
        self.bounds: list[tuple[int, int]] = []
        self._size: list[int] = []
        for parameter, start in flat.computed:
            if not self.bounds or start - self.bounds[-1][0] >= share:
                if self.bounds:
                    self.bounds[-1] = (self.bounds[-1][0], start)
                self.bounds.append((start, flat.grad.numel()))
                self._size.append(0)
            bucket = len(self.bounds) - 1
            self._size[bucket] += 1
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
        self._missing: list[int] = []
        self._pending: list[Any] = []
        self.begin(active=False, first=True)

    def begin(self, *, active: bool, first: bool) -> None:
        """Before a backward. active: whether its gradients complete the step; first: whether they are its first."""
        self._active, self._first = active, first
        self._missing = list(self._size)

    def _arrived(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        if self._active and not self._missing[bucket]:
            self._send(bucket)

    def _send(self, bucket: int) -> None:
        start, end = self.bounds[bucket]
        self.flat.gather(self._first, slice(start, end))
        self._pending.append(dist.all_reduce(self.flat.reduced[start:end], async_op=True))
        self._missing[bucket] = -1

    def wait(self) -> None:
        """Send the runs that some parameter without a gradient held back, and wait for all (on the device)."""
        for bucket, missing in enumerate(self._missing):
            if missing > 0:
                self._send(bucket)
        for work in self._pending:
            work.wait()
        self._pending.clear()
