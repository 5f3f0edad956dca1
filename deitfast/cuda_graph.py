"""CUDA graphs, captured in one way: on a stream of its own, beside threads that load data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is inside goes to `stream`, after what is queued on the current one and before what will be; None: as is."""
    if stream is None:
        yield
        return
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


def capture(
    call: Callable[[], T], stream: torch.cuda.Stream | None = None, device: torch.device | None = None,
    pool: Any = None,
) -> tuple[torch.cuda.CUDAGraph, T]:  # fmt: skip
    """`call` as a graph, and what it returned: tensors that each replay fills. Nothing of it has run yet.

    stream: one on which `call` has run before, because kernels compile and libraries set themselves up the first time,
    which a capture does not survive; None runs it once on a new one of `device` (None: the current one). pool: memory
    of other graphs, to be shared with them. Raises RuntimeError where it cannot be captured.
    """
    if stream is None:
        stream = torch.cuda.Stream(device)
        with on_stream(stream):
            call()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(stream.device)
    try:
        # Threads of a data loader call CUDA meanwhile: only this thread's calls belong to the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = call()
    except Exception:
        torch.cuda.set_stream(before)  # where the end of a capture fails, its stream stays the current one
        raise
    return graph, result
