"""Processes of one test, side by side, forked from a server that has imported what takes each new one six seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.multiprocessing


def in_processes(work: Callable[..., None], size: int, *args: object) -> None:
    """`work(rank, *args)` in `size` processes; what one of them raises is raised here."""
    _preload()
    torch.multiprocessing.start_processes(work, args, size, start_method="forkserver")


@contextmanager
def running(file: Path, arguments: Sequence[str], said: Path, size: int = 1) -> Iterator[list[BaseProcess]]:
    """`torchrun --nproc-per-node=size file arguments`, but for the launcher; killed at the latest here.

    said: file of what process 0 prints; another's lies beside it, with its number at the end.
    """
    _preload()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    made = [
        context.Process(target=_run, args=(rank, size, port, str(file), list(arguments), _said(said, rank)))
        for rank in range(size)
    ]
    try:
        for process in made:
            process.start()
        yield list(made)
    finally:
        for process in made:
            process.kill()
            process.join()


def run(file: Path, arguments: Sequence[str], said: Path, size: int = 1, seconds: float = 240) -> str:
    """`running` until its end, which must be a good one; what process 0 printed."""
    with running(file, arguments, said, size) as processes:
        for process in processes:
            process.join(seconds)
        codes = [process.exitcode for process in processes]
    assert codes == [0] * size, "\n".join(Path(_said(said, rank)).read_text()[-3000:] for rank in range(size))
    return said.read_text()


def _preload() -> None:
    multiprocessing.set_forkserver_preload(["torch._dynamo", "nvidia.dali", "deitfast.training.train"])


def _said(said: Path, rank: int) -> str:
    return f"{said}{f'.{rank}' if rank else ''}"


def _run(rank: int, size: int, port: int, file: str, arguments: list[str], said: str) -> None:
    with open(said, "wb") as out:
        for standard in (1, 2):
            os.dup2(out.fileno(), standard)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ |= {f"{local}RANK": str(rank) for local in ("", "LOCAL_")}
    os.environ |= {f"{local}WORLD_SIZE": str(size) for local in ("", "LOCAL_")}
    torch.set_num_threads(1)
    sys.argv = [file, *arguments]
    runpy.run_path(file, run_name="__main__")
