"""The project's own kernels as compiled code on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from deitfast.kernels import common
from tests.ptx import driver
from tests.ptx.binding import compiler

needs_engine = pytest.mark.skipif(
    common.INTERPRETED or compiler() is None,
    reason="compiled code needs a C compiler, and Triton's compiler switched on",
)


@contextlib.contextmanager
def compiled_kernels(arch: int, **options: Any) -> Iterator[driver.EmulatedGpu]:
    """Within, ops on CPU tensors launch their kernels, with the launch tables and as compiled code of `arch`.

    options: see `driver.emulated`.
    """
    with driver.emulated(arch, **options) as gpu, pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "STANDS_FOR", arch)
        yield gpu
