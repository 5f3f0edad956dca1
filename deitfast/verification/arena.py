"""Memory in which a stray access shows: what an op allocates is full of NaN and has guard bands at both ends.

Every byte is 0xFF, which is NaN in each floating dtype and -1 in the integers. An element that nothing wrote stays NaN,
a value read from beside an operand is NaN and spreads, and a write beside a tensor leaves its trace in a band.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

GUARD = 64 << 10
"""Bytes of a band: some rows of any operand, and a multiple of what an allocation is aligned to."""
_PATTERN = 0xFF
_EMPTY, _ZEROS = ("empty", "empty_like", "new_empty"), ("zeros", "zeros_like", "new_zeros")


class Arena:
    """Guarded memory of one device, kept until the arena goes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._blocks: list[tuple[Tensor, int]] = []  # with its bands, bytes between them
        self._empty = torch.empty

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`, strides included, with guard bands."""
        return self._take(tensor).copy_(tensor)

    def touched(self) -> bool:
        """Whether anything was written outside of a tensor; waits for the device."""
        return any(
            bool((band != _PATTERN).any())
            for block, size in self._blocks
            for band in (block[:GUARD], block[GUARD + size :])
        )

    @contextlib.contextmanager
    def allocating(self) -> Iterator[None]:
        """torch's functions that make tensors take guarded memory inside, in every thread."""
        with torch.device("cpu"):  # at its first use as a context it remembers these functions: not the replaced ones
            torch.empty(0)
        places: list[tuple[Any, str]] = [
            (torch.Tensor if name.startswith("new_") else torch, name) for name in (*_EMPTY, *_ZEROS)
        ]
        before = [getattr(owner, name) for owner, name in places]
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, self._guarded(make, zero=name in _ZEROS))
        try:
            yield
        finally:
            for (owner, name), make in zip(places, before, strict=True):
                setattr(owner, name, make)

    def _guarded(self, make: Callable[..., Tensor], zero: bool) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            given = args[0] if args and isinstance(args[0], Tensor) else None
            device = kwargs.get("device") or (given.device if given is not None else "cpu")
            if torch.device(device).type != self.device.type:
                return make(*args, **kwargs)
            like = make(*args, **{**kwargs, "device": "meta", "pin_memory": False})
            if like.dtype == torch.bool or not like.numel():
                return make(*args, **kwargs)
            out = self._take(like)
            return out.zero_() if zero else out

        return allocate

    def _take(self, like: Tensor) -> Tensor:
        """Guarded memory of the shape, strides and dtype of `like`."""
        elements = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        size = elements * like.element_size()
        block = self._empty(GUARD + size + GUARD, dtype=torch.uint8, device=self.device).fill_(_PATTERN)
        self._blocks.append((block, size))
        return block[GUARD : GUARD + size].view(like.dtype).as_strided(like.shape, like.stride())
