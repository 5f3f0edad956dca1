"""The sum of the gradient over all processes, while the backward still computes."""

from __future__ import annotations

import time
from typing import Any

from deitfast.engine.flat import FlatState


class Reduction:
    """Sums the flat gradient over all processes, a bucket at a time, while the backward still computes the others.

    When autograd has the last gradient of a bucket, its reduce-scatter starts; `wait` ends the step's. Buckets go in
    one order, from the last, whose gradients come first, to the first: all processes must begin the same collective,
    whatever order their gradients arrive in. A bucket's run are the parameters that end in it: all that lies in it is
    there once its run and those behind have arrived. seconds_waiting: host time that `wait` took so far.
    """

    def __init__(self, flat: FlatState) -> None:
        self.flat, self.shards = flat, flat.shards
        length, size = self.shards.size // self.shards.buckets, self.shards.size
        self._runs = [slice(0, 0)] * self.shards.buckets
        self._size = [0] * self.shards.buckets  # parameters of each run
        for parameter, start in reversed(flat.computed):
            bucket = (start + max(parameter.numel(), 1) - 1) // length
            end = self._runs[bucket].stop or size
            self._runs[bucket], self._size[bucket], size = slice(start, end), self._size[bucket] + 1, start
            parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))
        self._pending: list[Any] = []
        self.seconds_waiting = 0.0
        self.begin(active=False, first=True)

    def begin(self, *, active: bool, first: bool) -> None:
        """Before a backward. active: whether its gradients complete the step; first: whether they are its first."""
        self._active, self._first = active, first
        self._missing = list(self._size)
        self._next = self.shards.buckets - 1

    def wait(self) -> None:
        """Send the buckets that some parameter without a gradient held back, and wait for all (on the device)."""
        while self._next >= 0:
            self._send()
        began = time.perf_counter()
        for work in self._pending:
            work.wait()
        self._pending.clear()
        self.seconds_waiting += time.perf_counter() - began

    def _arrived(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        while self._active and self._next >= 0 and self._missing[self._next] <= 0:
            self._send()

    def _send(self) -> None:
        flat = self.flat
        flat.gather(self._first, self._runs[self._next])
        if flat.sent is not flat.outgoing:
            bucket = self.shards.bounds(self._next)
            flat.sent[bucket].copy_(flat.outgoing[bucket])
        self._pending.append(self.shards.sum(self._next, flat.sent, flat.reduced))
        self._next -= 1
