"""The project's own kernels as compiled code on CPU tensors."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import deitfast.kernels
from deitfast.kernels.common import INTERPRETED, has_data
from tests.ptx import driver
from tests.ptx.binding import compiler

needs_engine = pytest.mark.skipif(
    INTERPRETED or compiler() is None, reason="compiled code needs a C compiler, and Triton's compiler switched on"
)


@contextlib.contextmanager
def compiled_kernels(arch: int, **options: Any) -> Iterator[driver.EmulatedGpu]:
    """Within, ops on CPU tensors launch their kernels, with the launch tables and as compiled code of `arch`.

    options: see `driver.emulated`. The modules of `deitfast.kernels` have the functions that decide by name.
    """
    modules = [
        importlib.import_module(m.name) for m in pkgutil.iter_modules(deitfast.kernels.__path__, "deitfast.kernels.")
    ]
    with driver.emulated(arch, **options) as gpu, pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, function in (("runs_triton", has_data), ("architecture", lambda x: arch)):
                if hasattr(module, name):
                    patch.setattr(module, name, function)
        yield gpu
