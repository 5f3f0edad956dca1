"""Sums over the rows of a small matrix, the last step of most parameter gradients; no public op.

    out[c] = sum_r weights[r] * x[r, c]        weights optional

x (R, C) of any float dtype, weights (R,) fp32; summed in fp32 and rounded once, to the dtype of out. One launch where
PyTorch needs one for the sum and one for the cast. A program owns a block of columns and takes the rows in their order:
the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import INTERPRETED, Launch, launch, runs_triton

LAUNCH = Launch({"BLOCK_R": 128, "BLOCK_C": 32}, num_warps=4, num_stages=2)
# Triton's interpreter pays for every operation, whatever the size of its tensors: there large tiles are fast.
INTERPRETER_LAUNCH = Launch({"BLOCK_R": 256, "BLOCK_C": 512}, num_warps=4, num_stages=1)


@triton.jit
def row_sums_kernel(
    x,  # (R, C), contiguous columns
    weights,  # (R,) fp32 or None
    out,  # (C,)
    second,  # (C,) or None: the sums of the next C columns of x
    stride_x,
    R,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(1)
    x += which * C
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < R)[:, None] & (column < C)[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + row, mask=row < R, other=0.0)[:, None]
        sums += values
    total = tl.sum(sums, 0).to(out.dtype.element_ty)
    if second is None:
        tl.store(out + column, total, mask=column < C)
    else:
        tl.store(out + column, total, mask=(column < C) & (which == 0))
        tl.store(second + column, total, mask=(column < C) & (which == 1))


def row_sums(x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (R, C), weights (R,) fp32 or None -> (C,) of `dtype`, in `out` where it is given."""
    out = torch.empty(x.shape[1], dtype=dtype, device=x.device) if out is None else out
    if not runs_triton(x):
        return out.copy_(x.float().sum(0) if weights is None else weights @ x.float())
    _launch(x, weights, out, None)
    return out


def row_sums_of_two(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (R, 2, C) contiguous -> the two halves' sums, (C,) of `dtype` each, in one launch."""
    first, second = (torch.empty(x.shape[2], dtype=dtype, device=x.device) for _ in range(2))
    if not runs_triton(x):
        sums = x.float().sum(0)
        return first.copy_(sums[0]), second.copy_(sums[1])
    _launch(x.flatten(1), None, first, second)
    return first, second


def _launch(x: Tensor, weights: Tensor | None, out: Tensor, second: Tensor | None) -> None:
    entry = INTERPRETER_LAUNCH if INTERPRETED else LAUNCH
    R, C = x.shape[0], out.shape[0]
    grid = triton.cdiv(C, entry.tiles["BLOCK_C"]), 1 if second is None else 2
    launch(row_sums_kernel, grid, entry, x=x, weights=weights, out=out, second=second, stride_x=x.stride(0), R=R, C=C)
