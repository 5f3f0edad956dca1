"""Processes of one test, side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch.multiprocessing


def in_processes(work: Callable[..., None], size: int, *args: object) -> None:
    """`work(rank, *args)` in `size` processes; what one of them raises is raised here.

    They are forked from a server that has imported torch and the package, which takes each process three seconds.
    """
    multiprocessing.set_forkserver_preload(["torch._dynamo", "deitfast.training.train", work.__module__])
    torch.multiprocessing.start_processes(work, args, size, start_method="forkserver")
