"""The sum of the gradient over all processes, while the backward still computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from deitfast.engine.flat import FlatState


class Reduction:
    """Sums the flat gradient over all processes, a bucket at a time, while the backward still computes the others.

    When autograd has written the last gradient of a bucket, its reduce-scatter starts; `wait` ends the step's. Buckets
    go in one order, from the last, whose gradients come first, to the first: all processes must begin the same
    collective, whatever order their gradients arrive in.
    """

    def __init__(self, flat: FlatState, model: nn.Module) -> None:
        self.flat, self.shards = flat, flat.shards
        self._size = [0] * self.shards.buckets  # parameters with gradients in each
        for parameter in model.parameters():
            if parameter.requires_grad:
                touched = self._buckets_of(parameter)
                for bucket in touched:
                    self._size[bucket] += 1
                parameter.register_post_accumulate_grad_hook(lambda _, touched=touched: self._arrived(touched))
        self._pending: list[Any] = []
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
        for work in self._pending:
            work.wait()
        self._pending.clear()

    def _buckets_of(self, parameter: nn.Parameter) -> range:
        assert parameter.grad is not None  # a view into flat.grad
        first, length = int(parameter.grad.storage_offset()), self.shards.size // self.shards.buckets
        return range(first // length, (first + max(parameter.numel(), 1) - 1) // length + 1)

    def _arrived(self, touched: range) -> None:
        for bucket in touched:
            self._missing[bucket] -= 1
        while self._active and self._next >= 0 and self._missing[self._next] <= 0:
            self._send()

    def _send(self) -> None:
        part = self.shards.bounds(self._next)
        self.flat.accumulate(self._first, part)
        self.flat.round_outgoing(part)
        self._pending.append(self.shards.sum(self._next, self.flat.outgoing, self.flat.reduced))
        self._next -= 1
