"""Kernels compiled before they are wanted: Triton keeps them on the disk, where whoever runs them finds them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import replace
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from deitfast.kernels.catalogue import OPS, Draw, Shape
from deitfast.kernels.tunable import Pick, entry_of, picked, recorded
from deitfast.verification.case import Case

_BATCH = 16
"""Samples: a kernel is compiled anew for another divisibility of a size, not for another size."""


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Triton compiles what is called, and launches nothing."""
    run = JITFunction.run

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = compile_it
    try:
        yield
    finally:
        JITFunction.run = run


def compile_all(case: Case, selection: str, entries: Sequence[Pick], seconds: float) -> Iterator[int]:
    """Compile what `case` launches by each of these entries, with every core; yields how many are done.

    An entry that does not compile, or not in time, is left to whoever runs it.
    """
    told = (case.op.name, replace(case.shape, batch=_BATCH), case.dtype, str(case.device), dict(case.drawn), selection)
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(entries)) or 1, multiprocessing.get_context("spawn"))
    try:
        futures = [pool.submit(_compile, *told, recorded(entry)) for entry in entries]
        for done, _ in enumerate(as_completed(futures, timeout=max(seconds, 1.0)), 1):
            yield done
    except TimeoutError:
        pass
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


def _compile(
    op: str, shape: Shape, dtype: torch.dtype, device: str, drawn: dict[str, Any], selection: str, entry: Any
) -> None:
    of_batch = {**drawn, "subset": min(drawn["subset"], shape.batch - 1)}
    case = Case.draw(OPS[op], shape, Draw(0, dtype, device), **of_batch)
    with compile_only(), picked({selection: entry_of(entry)}):
        case.run(case.op.function)
