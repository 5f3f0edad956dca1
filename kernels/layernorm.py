"""LayerNorm over the last dimension, forward and backward: the kernels that the fused ops share; no public op.

    xhat = (x - mean(x)) / sqrt(var(x) + eps)      out = xhat * weight + bias

x (M, D) bf16, fp16 or fp32; weight, bias (D,), any of the three; mean, rstd (M,) fp32, saved for the backward:

    g = dout * weight      dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) [+ dresidual]
    dweight = sum_m dout * xhat      dbias = sum_m dout

A program holds whole rows, so x is read once and the variance is that of the centred row (no cancellation whatever
the mean). dresidual is the gradient that reaches x past the branch: adding it here saves a pass over x.
dweight and dbias are summed per program, then over programs: no atomics, the same bits in every run.

Where a branch runs for a subset of the samples (subset_rows.py), out, dout, mean and rstd have the M rows of those
samples, and x, dresidual and dx those of the batch. The same kernels then copy the other rows: x to the output of the
branch in the forward, dresidual to dx in the backward.

Why LayerNorm is not folded into the matrix product that follows (layernorm_linear.py has both in one kernel otherwise).
The fold rstd * (x W'^T - mean * colsum(W')), W' = weight * W, subtracts two numbers |mean| / std times larger than
their difference: in fp32, with rows of |mean| / std = 3, its error is 2.8 to 3.6 times eager PyTorch's, where this pass
has 0.96 to 1.13 times; the limit is 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import (
    INTERPRETED,
    Launch,
    check_last_contiguous,
    check_same_or_fp32,
    check_shape,
    launch,
    runs_triton,
)
from deitfast.kernels.row_sums import row_sums_of_two
from deitfast.kernels.subset_rows import SubsetRows, branch_rows, copy_other_rows, subset_row
from deitfast.kernels.tunable import tunable

BWD_PROGRAMS = {2: 528, 4: 396}
"""Bytes a value of x -> programs of the backward: four or, where registers allow no more, three for each of an H100's
132 multiprocessors; fixed, so that no chip changes the sums."""
BWD_PROGRAMS_UNALIGNED = 264
"""Of rows that are no multiple of 16 values, which no thread loads as vectors: two for each."""


def _other_rows(stage: str, columns: int, itemsize: int) -> Iterator[Launch]:
    """Half and twice the rows a warp."""
    own = _launch(stage, columns, itemsize)
    for rows, warps in ((own.tiles["BLOCK_M"], own.num_warps * 2), (own.tiles["BLOCK_M"] * 2, own.num_warps)):
        yield replace(own, tiles={**own.tiles, "BLOCK_M": rows}, num_warps=warps)


def _all_rows(stage: str, columns: int, itemsize: int) -> Iterator[Launch]:
    """What a search tries: 4 to 32 values of each operand a thread."""
    block, backward = triton.next_power_of_2(columns), stage == "bwd"
    for rows, warps, blocks in itertools.product((1, 2, 4, 8), (4, 8, 2, 1), (4, 8, 2) if backward else (0,)):
        if 4 <= rows * block // (32 * warps) <= 32:
            yield Launch({"BLOCK_M": rows, "BLOCK_D": block}, warps, 2, programs=132 * blocks)


def _launch(stage: str, columns: int, itemsize: int) -> Launch:
    block = triton.next_power_of_2(columns)
    if stage == "fwd":
        tiles = {"BLOCK_M": max(1, (32768 if INTERPRETED else 1024) // block), "BLOCK_D": block}
        return Launch(tiles, num_warps=min(16, max(1, block // 1024)), num_stages=2)
    tiles = {"BLOCK_M": max(1, (32768 if INTERPRETED else 2048) // block), "BLOCK_D": block}
    programs = BWD_PROGRAMS_UNALIGNED if columns % 16 else BWD_PROGRAMS[itemsize]
    return Launch(tiles, min(16, max(4, block // 512)), num_stages=2, programs=programs)


@tunable(_other_rows, _all_rows)
def layernorm_launch(stage: str, columns: int, itemsize: int) -> Launch:
    """Rows a program holds at once and warps, for any chip.

    The forward has whole rows in one warp up to 1,024 columns, so that no sum waits for other warps: 32 values a
    thread. The backward holds three operands and two sums: about 16 values of each a thread.
    stage: fwd or bwd; itemsize: bytes a value of x. Triton's interpreter pays for every operation, whatever the size of
    its tensors: there programs hold more rows.
    """
    return _launch(stage, columns, itemsize)


@triton.jit
def normalise_rows(
    first, x, weight, bias, subset, out, mean, rstd, stride_x, M, D, rows_per_sample, eps,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows from row `first` on, and their mean and rstd; arguments as of `layernorm_fwd_kernel`."""
    number = first + tl.arange(0, BLOCK_M)
    row = number.to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = (row < M)[:, None] & (column < D)[None, :]
    row_x = row
    if subset is not None:
        row_x = subset_row(number, subset, rows_per_sample, number < M)
    values = tl.load(x + row_x[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
    row_mean = tl.sum(values, 1) / D
    centred = tl.where(mask, values - row_mean[:, None], 0.0)
    row_rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)
    normed = centred * row_rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + row[:, None] * D + column[None, :], normed.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, row_mean, mask=row < M)
    tl.store(rstd + row, row_rstd, mask=row < M)


@triton.jit
def layernorm_fwd_kernel(
    x,  # (M, D), or all rows of the batch if `subset` is given
    weight,  # (D,)
    bias,  # (D,)
    subset,  # (K,) int64 or None
    out,  # (M, D)
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    other_out,  # like x, or None without `subset`: its other rows are written
    stride_x,
    M,
    D,
    K,
    rows_per_sample,
    other_rows,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_M
    normalise_rows(
        first, x, weight, bias, subset, out, mean, rstd, stride_x, M, D, rows_per_sample, eps, BLOCK_M, BLOCK_D
    )
    if subset is not None:
        for start in tl.range(first, other_rows, tl.num_programs(0) * BLOCK_M):
            copy_other_rows(x, other_out, subset, start, stride_x, other_rows, K, D, rows_per_sample, BLOCK_M, BLOCK_D)


@triton.jit
def layernorm_bwd_kernel(
    dout,  # (M, D)
    x,  # (M, D), or all rows of the batch if `subset` is given, as are dresidual and dx
    weight,  # (D,)
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    dresidual,  # (M, D) or None
    subset,  # (K,) int64 or None
    dx,  # (M, D)
    parts,  # (programs, 2, D) fp32: of dweight and dbias
    stride_x,
    M,
    D,
    K,
    rows_per_sample,
    other_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        number = start + tl.arange(0, BLOCK_M)
        row = number.to(tl.int64)
        mask = (row < M)[:, None] & (column < D)[None, :]
        row_x = row
        if subset is not None:
            row_x = subset_row(number, subset, rows_per_sample, number < M)
        offset = row_x[:, None] * D + column[None, :]
        g = tl.load(dout + row[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + row_x[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if dresidual is not None and dresidual.dtype.element_ty.primitive_bitwidth == 16:
            # Before the sums over rows, which wait for all that was asked for; of fp32 the registers are too few.
            past = tl.load(dresidual + offset, mask=mask, other=0.0)
        row_mean = tl.load(mean + row, mask=row < M, other=0.0)
        row_rstd = tl.load(rstd + row, mask=row < M, other=0.0)
        xhat = tl.where(mask, (values - row_mean[:, None]) * row_rstd[:, None], 0.0)
        dweight += g * xhat
        dbias += g
        g *= w[None, :]
        mean_g = tl.sum(g, 1) / D
        mean_g_xhat = tl.sum(g * xhat, 1) / D
        result = row_rstd[:, None] * (g - mean_g[:, None] - xhat * mean_g_xhat[:, None])
        if dresidual is not None:
            if dresidual.dtype.element_ty.primitive_bitwidth != 16:
                past = tl.load(dresidual + offset, mask=mask, other=0.0)
            result += past.to(tl.float32)
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=mask)
    if subset is not None:
        for start in tl.range(program * BLOCK_M, other_rows, tl.num_programs(0) * BLOCK_M):
            copy_other_rows(dresidual, dx, subset, start, D, other_rows, K, D, rows_per_sample, BLOCK_M, BLOCK_D)
    part = parts + program.to(tl.int64) * 2 * D + column
    tl.store(part, tl.sum(dweight, 0), mask=column < D)
    tl.store(part + D, tl.sum(dbias, 0), mask=column < D)


def check_layernorm(op: str, x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight_name: str, weight: Tensor) -> None:
    """Raise unless x (..., D), ln_weight and ln_bias (D,) have the dtype of the `weight` that follows, or are fp32."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., D) with D > 0")
    check_last_contiguous(op, "x", x)
    for name, parameter in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        check_shape(op, name, parameter, (x.shape[-1],))
        check_last_contiguous(op, name, parameter)
    check_same_or_fp32(op, weight_name, weight, x=x, ln_weight=ln_weight, ln_bias=ln_bias)


def subset_arguments(x: Tensor, subset: SubsetRows | None) -> dict[str, Any]:
    """The kernels' arguments about the subset of the samples of x (B * n, D)."""
    if subset is None:
        return {"subset": None, "K": 0, "rows_per_sample": 1, "other_rows": 0}
    return {
        "subset": subset.samples,
        "K": subset.samples.shape[0],
        "rows_per_sample": subset.rows_per_sample,
        "other_rows": x.shape[0] - subset.row_count,
    }


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    subset: SubsetRows | None = None,
    other_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, D), weight and bias (D,) -> out (M, D) of `dtype`, mean (M,) fp32, rstd (M,) fp32.

    subset: x has the rows of the batch, the results those of the subset. other_out: contiguous, like x; its other
    rows become those of x; what the subset's hold afterwards is undefined.
    """
    if not runs_triton(x):
        if subset is not None:
            assert other_out is not None
            other_out.copy_(x)
            x = x[subset.numbers()]
        out, mean, rstd = torch.native_layer_norm(x.float(), x.shape[1:], weight.float(), bias.float(), eps)
        return out.to(dtype), mean.flatten(), rstd.flatten()
    M, D = branch_rows(x, subset), x.shape[1]
    out = torch.empty((M, D), dtype=dtype, device=x.device)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    entry, samples = layernorm_launch("fwd", D, x.element_size()), subset_arguments(x, subset)
    launch(
        layernorm_fwd_kernel,
        (triton.cdiv(max(M, samples["other_rows"]), entry.tiles["BLOCK_M"]),),
        entry,
        x=x,
        weight=weight,
        bias=bias,
        out=out,
        mean=mean,
        rstd=rstd,
        other_out=other_out,
        stride_x=x.stride(0),
        M=M,
        D=D,
        eps=eps,
        **samples,
    )
    return out, mean, rstd


def layernorm_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None = None,
    subset: SubsetRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout and dresidual (M, D) contiguous, x (M, D) -> dx (M, D) like x, dweight and dbias (D,) like weight.

    subset: x, dresidual, which must be given, and dx have the rows of the batch; other rows have dx = dresidual.
    """
    if not runs_triton(x):
        if subset is not None:
            assert dresidual is not None
            rows = subset.numbers()
            dx, dweight, dbias = layernorm_bwd(dout, x[rows], weight, mean, rstd, dresidual[rows])
            return dresidual.index_copy(0, rows, dx), dweight, dbias
        parameters = weight.float(), weight.float()  # the bias is asked for its shape alone
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dout.float(), x.float(), x.shape[1:], mean[:, None], rstd[:, None], *parameters, [True, True, True]
        )
        if dresidual is not None:
            dx += dresidual
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)
    M, D = dout.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    entry, samples = layernorm_launch("bwd", D, x.element_size()), subset_arguments(x, subset)
    programs = min(entry.programs, triton.cdiv(max(M, samples["other_rows"]), entry.tiles["BLOCK_M"]))
    parts = torch.empty((programs, 2, D), dtype=torch.float32, device=x.device)
    launch(
        layernorm_bwd_kernel,
        (programs,),
        entry,
        dout=dout,
        x=x,
        weight=weight,
        mean=mean,
        rstd=rstd,
        dresidual=dresidual,
        dx=dx,
        parts=parts,
        stride_x=x.stride(0),
        M=M,
        D=D,
        **samples,
    )
    return dx, *row_sums_of_two(parts, weight.dtype)
