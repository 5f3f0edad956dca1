"""Products of bf16 matrices, computed as tensor cores do: summed in fp32, rounded once.

So does PyTorch on a CPU, but where the CPU has no instructions for bf16 it takes ten times as long over it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tests.rehearsal.memory import on_host  # before torch

import torch  # isort: skip
from torch import Tensor

_LIBRARY = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Put these in place of PyTorch's own, on the CPU and on the pretended device, for the rest of the process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this takes the place of something
        for name in ("mm", "bmm", "addmm", "baddbmm"):
            on_cpu = _through_fp32(getattr(torch.ops.aten, name).out)
            _LIBRARY.impl(name, on_cpu, "CPU", allow_override=True)
            _LIBRARY.impl(name, _on_device(on_cpu), "CUDA", allow_override=True)


def _through_fp32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`product` writes to a tensor that it is given, which remains PyTorch's own."""

    def multiply(*matrices: Tensor, **factors: Any) -> Tensor:
        dtype = matrices[-1].dtype
        if dtype == torch.bfloat16:
            matrices = tuple(matrix.float() for matrix in matrices)
        out = product(*matrices, **factors, out=matrices[-1].new_empty(0))
        return out.to(dtype)

    return multiply


def _on_device(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On the pretended device's memory, where the product is counted and what it takes on the host is not."""

    def multiply(*matrices: Tensor, **factors: Any) -> Tensor:
        found = on_cpu(*map(on_host, matrices), **factors)
        out = torch.empty_like(found, device=matrices[-1].device)
        on_host(out).copy_(found)
        return out

    return multiply
