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
    stride_x,
    R,
    C,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        mask = (row < R)[:, None] & (column < C)[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * stride_x + column[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if weights is not None:
            values *= tl.load(weights + row, mask=row < R, other=0.0)[:, None]
        sums += values
    tl.store(out + column, tl.sum(sums, 0).to(out.dtype.element_ty), mask=column < C)


def row_sums(x: Tensor, dtype: torch.dtype, weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x (R, C), weights (R,) fp32 or None -> (C,) of `dtype`, in `out` where it is given."""
    out = torch.empty(x.shape[1], dtype=dtype, device=x.device) if out is None else out
    if not runs_triton(x):
        return out.copy_(x.float().sum(0) if weights is None else weights @ x.float())
    entry = INTERPRETER_LAUNCH if INTERPRETED else LAUNCH
    (R, C), grid = x.shape, (triton.cdiv(x.shape[1], entry.tiles["BLOCK_C"]),)
    launch(row_sums_kernel, grid, entry, x=x, weights=weights, out=out, stride_x=x.stride(0), R=R, C=C)
    return out
