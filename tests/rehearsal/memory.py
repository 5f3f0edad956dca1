"""The pretended device's functions and memory. Imported before anything that imports torch."""

from __future__ import annotations

import weakref

from tests.rehearsal.device import load

DEVICE = load()

from typing import TYPE_CHECKING  # noqa: E402

import torch  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

PINNED: set[int] = set()
"""Addresses of the pinned host tensors that are alive."""


def on_host(x: Tensor) -> Tensor:
    """The CPU tensor over the memory of `x`."""
    return torch.ops.rehearsal.on_host(x)


def wrap(x: Tensor, device: int) -> Tensor:
    """The tensor on cuda:`device` over the memory of a CPU tensor."""
    return torch.ops.rehearsal.wrap(x, device)


def pin(x: Tensor, device: object = None) -> Tensor:
    """A pinned copy, as Tensor.pin_memory gives it."""
    pinned = x.clone()
    address = pinned.data_ptr()
    PINNED.add(address)
    weakref.finalize(pinned, PINNED.discard, address)
    return pinned


def contexts() -> list[int]:
    """Devices on which this process has a context."""
    return [d for d in range(DEVICE.device_count()) if DEVICE.device_has_context(d)]


def copies() -> tuple[int, int]:
    """Copies so far (to the device, to the host, values that an op gave the host included)."""
    return DEVICE.copies_to_device(), DEVICE.copies_to_host()
