"""Faults that a GPU, or what stands on it, could have: each makes of an op's result what the faulty op would give."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.planted_kernels.planted import not_a_kernel

Fault = Callable[[Tensor], Tensor]


def raises(out: Tensor) -> Tensor:
    raise RuntimeError("Triton Error [CUDA]: out of resources: shared memory\nmore of it")


def does_not_compile(out: Tensor) -> Tensor:
    source = ASTSource(not_a_kernel, {"x_ptr": "*fp32"}, {"N": 16})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return out


def last_column_is_wrong(out: Tensor) -> Tensor:
    out = out.clone()
    out[..., -1] += 0.5
    return out


def second_call_is_wrong() -> Fault:
    calls = iter(range(1 << 30))

    def fault(out: Tensor) -> Tensor:
        return last_column_is_wrong(out) if next(calls) % 2 else out

    return fault


def writes_past_its_output(out: Tensor) -> Tensor:
    made = torch.empty(out.shape, dtype=out.dtype, device=out.device).copy_(out)
    bytes_there = made.untyped_storage().nbytes() // made.element_size()
    if bytes_there > made.storage_offset() + made.numel():  # in memory without bands it would hit another tensor
        made.detach().as_strided((1,), (1,), made.storage_offset() + made.numel()).fill_(1.0)
    return made


def leaves_a_row_unwritten(out: Tensor) -> Tensor:
    made = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    made[1:] = out[1:]
    return made


FAULTS: dict[str, tuple[Callable[[], Fault], str]] = {
    "raises at launch": (
        lambda: raises,
        "it raises: RuntimeError: Triton Error .CUDA.: out of resources: shared memory",
    ),
    "does not compile": (lambda: does_not_compile, "it does not compile: "),
    "wrong in its last column": (lambda: last_column_is_wrong, "largest error"),
    "wrong in the second call": (second_call_is_wrong, "a second call gives 1?[0-9]+ other values"),
    "writes past its output": (lambda: writes_past_its_output, "it writes outside of its tensors"),
    "leaves a row unwritten": (lambda: leaves_a_row_unwritten, "values are not finite"),
}
"""Name -> what makes the fault, and how it must be told."""
