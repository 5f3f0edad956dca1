"""A function of a batch of images, replayed as CUDA graphs: one a batch size, captured and checked at its first use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deitfast.cuda_graph import capture
from deitfast.errors import first_line, say
from deitfast.verification.verdict import REPORT

LARGEST_GRAPH = 256
"""Images of the largest graph; a longer batch is run in pieces of so many."""
_SAME = 2.0**-8
"""Of the largest result: how far those of a replay may be from those of the function."""


@dataclass
class _Graph:
    images: Tensor  # (m, ...), static
    results: Tensor  # (m, ...), static
    graph: torch.cuda.CUDAGraph


class Graphed:
    """`run` of a batch of images, from CUDA graphs on a GPU; `run` itself on a CPU, or where `on` is false.

    run: images (m, ...) on the device to results (m, ...), a row an image; reads nothing on the host. What it computes
        with may get other values from call to call, but stays where it lies.
    size: images of the one graph, to which fewer are padded; None: the next power of two, a graph each.
    A graph that cannot be had, or whose replay is not what `run` gives, is told; then `run` goes on without graphs.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], device: torch.device, *, size: int | None = None, on: bool = True
    ) -> None:
        self.run, self.device, self.size = run, device, size
        self.on = on and device.type == "cuda"
        self.captured: dict[int, _Graph] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """The results of images on any device."""
        if not self.on:
            return self.run(images.to(self.device, non_blocking=True))
        return torch.cat([self._replay(part) for part in images.split(self.size or LARGEST_GRAPH)])

    def _replay(self, images: Tensor) -> Tensor:
        count = len(images)
        size = self.size or graph_size(count)
        if size not in self.captured:
            try:
                self.captured[size] = self._capture(images, size)
            except RuntimeError as error:
                self.on = False
                remedy = "" if isinstance(error, torch.OutOfMemoryError) else f". {REPORT}"
                say(f"images go on without CUDA graphs: one cannot be trusted here: {first_line(error)}{remedy}")
        if not self.on:
            return self.run(images.to(self.device, non_blocking=True))
        captured = self.captured[size]
        captured.images[:count].copy_(images, non_blocking=True)
        captured.graph.replay()
        return captured.results[:count].clone()

    def _capture(self, images: Tensor, size: int) -> _Graph:
        """The graph of `size` images. Raises RuntimeError where there is none, or what it replays is not `run`."""
        static = torch.zeros(size, *images.shape[1:], dtype=images.dtype, device=self.device)
        graph, results = capture(lambda: self.run(static), device=self.device)
        static[: len(images)].copy_(images)
        graph.replay()
        expected = self.run(static)
        if not torch.allclose(results, expected, rtol=0, atol=_SAME * float(expected.abs().max()), equal_nan=True):
            raise RuntimeError(f"a replay is up to {float((results - expected).abs().max()):.3g} off what it replays")
        return _Graph(static, results, graph)


def graph_size(count: int) -> int:
    """The power of two that `count` images, at most `LARGEST_GRAPH`, are padded to."""
    return 1 << max(count - 1, 0).bit_length()
