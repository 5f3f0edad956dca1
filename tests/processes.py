"""Processes of one test, side by side, forked from a server that has imported what takes each new one six seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO

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


class ForkedModule:
    """As much of `subprocess.Popen` as `python -m MODULE ...` needs, without a new interpreter and its imports.

    stdout, stderr: open files, by whose names the process opens them for itself. The module runs as `__main__`. To be
    used in a process of `in_processes`, which forks itself. `atexit` does not run.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path, stdout: IO[str], stderr: IO[str], start_new_session: bool
    ) -> None:
        interpreter, flag, *words = command
        assert (interpreter, flag, start_new_session) == (sys.executable, "-m", True)
        target, files = _run_module, (stdout.name, stderr.name)
        self.process = multiprocessing.get_context("fork").Process(target=target, args=(words, str(cwd), files))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0.0)
        return self.process.exitcode


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


def _run_module(words: list[str], cwd: str, files: tuple[str, str]) -> None:
    os.setsid()
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(cwd)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
