"""Fixtures of the kernel tests: which devices, which dtypes, and memory that shows when it is read unwritten.

The same tests run four ways. On CPU tensors: the eager implementations; the kernels as compiled code for a chip
(`tests/ptx`); with TRITON_INTERPRET=1 in the environment the kernels in Triton's interpreter. And on a CUDA device
(marker `gpu`). Compiled code is for bf16, which the interpreter cannot multiply, and for ops of one dtype; the
interpreter, which compiles nothing, is for fp32 and fp16 and for shapes of every kind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.kernels.common import INTERPRETED
from tests.ptx.binding import compiler
from tests.ptx.kernels import compiled_kernels, needs_engine

COMPILED = {} if INTERPRETED else {"sm_80": 80, "sm_90": 90}
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
DEVICES = ["cpu", *(pytest.param(chip, marks=needs_engine) for chip in COMPILED), CUDA]
ONE_DTYPE = {"test_image_ops.py", "test_optimizer.py"}
"""Files of the ops that take uint8 or fp32 whatever the model computes in."""
NO_KERNELS = {"test_fake.py"}
"""Files that launch none, by name: the interpreter has nothing to add."""
OTHER_ON_SM_80 = {"test_attention.py", "test_linear_ops.py", "test_patch_embed.py"}
"""Files of the kernels that read by pointer there and by descriptor on sm_90; others are nearly the same code."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what another way to run the kernels shows already."""
    folder = Path(__file__).parent
    left_out = {item for item in items if item.path.parent == folder and not _shows_more(item)}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _shows_more(item: pytest.Item) -> bool:
    file, parameters = item.path.name, item.callspec.params if hasattr(item, "callspec") else {}
    if INTERPRETED:
        return file not in NO_KERNELS and (file not in ONE_DTYPE or compiler() is None)
    if (chip := parameters.get("device")) in COMPILED:
        bf16 = file in ONE_DTYPE or parameters.get("dtype") == torch.bfloat16
        return bf16 and (chip == "sm_90" or file in OTHER_ON_SM_80)
    return True


@contextlib.contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """The device of one of `DEVICES`: for a chip in `COMPILED` it is the CPU, and kernels run as that chip's code."""
    with compiled_kernels(COMPILED[name]) if name in COMPILED else contextlib.nullcontext():
        yield torch.device("cpu" if name in COMPILED else name)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The CPU, the CPU with kernels as compiled code for a chip, and the CUDA device where there is one."""
    with on_device(request.param) as device:
        yield device


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype the ops take; bfloat16 is skipped in the interpreter."""
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return request.param


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty, empty_like and new_empty return NaN, so that a read of memory which nothing wrote shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_nan

    # On its first use torch.device as a context remembers the functions that make tensors: they must be the real ones.
    with torch.device("cpu"):
        torch.empty(0)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
