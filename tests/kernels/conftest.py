"""Fixtures of the kernel tests: which devices, which dtypes, and memory that shows when it is read unwritten.

The same tests run three ways: as they are (CPU tensors take the eager implementations), with TRITON_INTERPRET=1 in the
environment (CPU tensors run the Triton kernels in the interpreter) and with a CUDA device (marker `gpu`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deitfast.kernels.common import INTERPRETED

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the CUDA device where there is one."""
    return torch.device(request.param)


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
