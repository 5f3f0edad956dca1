"""LayerNorm over the last dimension, forward and backward: the kernels that the fused ops share; no public op.

    xhat = (x - mean(x)) / sqrt(var(x) + eps)      out = xhat * weight + bias

x (M, D) bf16, fp16 or fp32; weight, bias (D,), any of the three; mean, rstd (M,) fp32, saved for the backward:

    g = dout * weight      dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) [+ dresidual]
    dweight = sum_m dout * xhat      dbias = sum_m dout

A program holds whole rows, so x is read once and the variance is that of the centred row (no cancellation whatever
the mean). dresidual is the gradient that reaches x past the branch: adding it here saves a pass over x.
dweight and dbias are summed per program, then over programs: no atomics, the same bits in every run.

Why LayerNorm is a pass of its own, not folded into the matrix product that follows. The fold
rstd * (x W'^T - mean * colsum(W')), W' = weight * W, subtracts two numbers |mean| / std times larger than their
difference: in fp32, with rows of |mean| / std = 3, its error is 2.8 to 3.6 times eager PyTorch's, where this pass has
0.96 to 1.13 times; the limit is 2. Normalising a tile on its way into the product is exact too, but repeats the
arithmetic for every block of columns and moves the same bytes in training, since the weight gradient wants the
normalised rows in memory anyway. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import (
    INTERPRETED,
    CompileCase,
    Launch,
    check_last_contiguous,
    check_same_or_fp32,
    check_shape,
    runs_triton,
)

BWD_PROGRAMS = 528
"""Programs of the backward, four for each of an H100's 132 multiprocessors; fixed, so that no chip changes the sums."""


def layernorm_launch(columns: int) -> Launch:
    """Rows a program holds at once and warps, for any chip: about 16 values of each operand a thread.

    Triton's interpreter pays for every operation, whatever the size of its tensors: there programs hold more rows.
    """
    block = triton.next_power_of_2(columns)
    tiles = {"BLOCK_M": max(1, (32768 if INTERPRETED else 2048) // block), "BLOCK_D": block}
    return Launch(tiles, num_warps=min(16, max(4, block // 512)), num_stages=2)


@triton.jit
def layernorm_fwd_kernel(
    x,  # (M, D)
    weight,  # (D,)
    bias,  # (D,)
    out,  # (M, D)
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    stride_x,
    M,
    D,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    mask = (row < M)[:, None] & (column < D)[None, :]
    values = tl.load(x + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
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
def layernorm_bwd_kernel(
    dout,  # (M, D)
    x,  # (M, D)
    weight,  # (D,)
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    dresidual,  # (M, D) or None
    dx,  # (M, D)
    dweight_parts,  # (programs, D) fp32
    dbias_parts,  # (programs, D) fp32
    stride_x,
    M,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(program * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (row < M)[:, None] & (column < D)[None, :]
        offset = row[:, None] * D + column[None, :]
        g = tl.load(dout + offset, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(x + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(tl.float32)
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
            result += tl.load(dresidual + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offset, result.to(dx.dtype.element_ty), mask=mask)
    part = program.to(tl.int64) * D + column
    tl.store(dweight_parts + part, tl.sum(dweight, 0), mask=column < D)
    tl.store(dbias_parts + part, tl.sum(dbias, 0), mask=column < D)


def check_layernorm(op: str, x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight_name: str, weight: Tensor) -> None:
    """Raise unless x (..., D), ln_weight and ln_bias (D,) have the dtype of the `weight` that follows, or are fp32."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., D) with D > 0")
    check_last_contiguous(op, "x", x)
    for name, parameter in (("ln_weight", ln_weight), ("ln_bias", ln_bias)):
        check_shape(op, name, parameter, (x.shape[-1],))
        check_last_contiguous(op, name, parameter)
    check_same_or_fp32(op, weight_name, weight, x=x, ln_weight=ln_weight, ln_bias=ln_bias)


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, D), weight and bias (D,) -> out (M, D) of `dtype`, mean (M,) fp32, rstd (M,) fp32."""
    if not runs_triton(x):
        mean = x.float().mean(1)
        centred = x.float() - mean[:, None]
        rstd = centred.square().mean(1).add(eps).rsqrt()
        return (centred * rstd[:, None] * weight.float() + bias.float()).to(dtype), mean, rstd
    M, D = x.shape
    out = torch.empty((M, D), dtype=dtype, device=x.device)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    launch = layernorm_launch(D)
    with torch.cuda.device_of(x):
        layernorm_fwd_kernel[(triton.cdiv(M, launch.tiles["BLOCK_M"]),)](
            x=x,
            weight=weight,
            bias=bias,
            out=out,
            mean=mean,
            rstd=rstd,
            stride_x=x.stride(0),
            M=M,
            D=D,
            eps=eps,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.tiles,
        )
    return out, mean, rstd


def layernorm_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dresidual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dout and dresidual (M, D) contiguous, x (M, D) -> dx (M, D) like x, dweight and dbias (D,) like weight."""
    if not runs_triton(x):
        xhat = (x.float() - mean[:, None]) * rstd[:, None]
        g = dout.float() * weight.float()
        dx = rstd[:, None] * (g - g.mean(1, keepdim=True) - xhat * (g * xhat).mean(1, keepdim=True))
        if dresidual is not None:
            dx += dresidual
        dweight, dbias = (dout.float() * xhat).sum(0), dout.float().sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)
    M, D = x.shape
    dx = torch.empty((M, D), dtype=x.dtype, device=x.device)
    launch = layernorm_launch(D)
    programs = min(BWD_PROGRAMS, triton.cdiv(M, launch.tiles["BLOCK_M"]))
    parts = torch.empty((2, programs, D), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        layernorm_bwd_kernel[(programs,)](
            dout=dout,
            x=x,
            weight=weight,
            mean=mean,
            rstd=rstd,
            dresidual=dresidual,
            dx=dx,
            dweight_parts=parts[0],
            dbias_parts=parts[1],
            stride_x=x.stride(0),
            M=M,
            D=D,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            **launch.tiles,
        )
    return dx, parts[0].sum(0).to(weight.dtype), parts[1].sum(0).to(weight.dtype)


def _cases() -> Iterator[CompileCase]:
    for dtype in ("bf16", "fp32"):
        for columns in (192, 384, 768):
            launch = layernorm_launch(columns)
            rows = {"x": f"*{dtype}", "weight": f"*{dtype}", "mean": "*fp32", "rstd": "*fp32"}
            sizes = {"stride_x": "i32", "M": "i32", "D": "i32"}
            forward = {"bias": f"*{dtype}", "out": f"*{dtype}", "eps": "fp32"}
            backward = dict.fromkeys(("dout", "dresidual", "dx"), f"*{dtype}")
            backward |= dict.fromkeys(("dweight_parts", "dbias_parts"), "*fp32")
            for name, kernel, arguments in (
                ("layernorm_fwd", layernorm_fwd_kernel, forward),
                ("layernorm_bwd", layernorm_bwd_kernel, backward),
            ):
                yield CompileCase(
                    name=f"{name} {dtype} {columns} channels",
                    kernel=kernel,
                    signature=rows | arguments | sizes,
                    constexprs=launch.tiles,
                    num_warps=launch.num_warps,
                    num_stages=launch.num_stages,
                    matrix=False,
                    not_divisible=frozenset({"M"}),
                )


def compile_cases(arch: int) -> list[CompileCase]:
    """Both kernels at DeiT-Ti, S and B widths in bf16 and fp32; launches do not depend on `arch`."""
    return list(_cases())
