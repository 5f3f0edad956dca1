"""Crops, sizes and mirror images on the CPU, made of what DALI decoded.

PyTorch's antialiased bicubic resize of uint8 images is PIL's algorithm in vector instructions: within a few levels of
PIL, and several times as fast as PIL's and DALI's, in which a CPU loader spends most of its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def decoded(images: Any, i: int) -> torch.Tensor:
    """Image i of one of DALI's outputs on the CPU: uint8 (H, W, 3), a view of memory that DALI will reuse."""
    return torch.from_dlpack(images[i])


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (H, W, 3) to uint8 (height, width, 3): bicubic with antialiasing."""
    planes = image.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def resized_crop(image: torch.Tensor, box: np.ndarray, size: int, mirrored: bool) -> torch.Tensor:
    """The rectangle `box` (top, left, height, width) of an image as uint8 (size, size, 3), mirrored or not."""
    top, left, height, width = box.tolist()
    view = resized(image[top : top + height, left : left + width], size, size)
    return view.flip(1) if mirrored else view


def resized_centre(image: torch.Tensor, side: np.ndarray, start: np.ndarray, size: int) -> torch.Tensor:
    """An image resized to `side` (height, width), and of that the square of `size` at `start` (top, left)."""
    top, left = start.tolist()
    return resized(image, *side.tolist())[top : top + size, left : left + size]


class Workers:
    """Threads that share the samples of a batch."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="deitfast-views")

    def share(self, work: Callable[[slice], None], count: int) -> None:
        """work(part) for parts that together are range(count), all at once."""
        edges = np.linspace(0, count, self.threads + 1).astype(int).tolist()
        list(self._pool.map(work, (slice(a, b) for a, b in itertools.pairwise(edges) if a < b)))

    def close(self) -> None:
        self._pool.shutdown()
