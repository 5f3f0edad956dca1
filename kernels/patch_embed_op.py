"""Patches to tokens: the patch projection with bias, prefix tokens and position embedding in its epilogue.

    out[b, t]     = prefix_tokens[t] + pos_embed[t]                             t < T: class token, distillation token
    out[b, T + p] = weight patches[b, p] + bias + pos_embed[T + p]              p < P

patches (B, P, K), weight (D, K): the patch convolution's `weight.flatten(1)`, bias (D,), prefix_tokens (T, D),
pos_embed (T + P, D) -> out (B, T + P, D). Accumulated in fp32, rounded once. The program that holds the first patch of
an image also writes its prefix tokens, so one launch makes the whole tensor.

Saved for the backward: patches, which get no gradient (they are the network's input). One pass over dout sums it over
the batch and copies the rows of patches, without the gaps that the prefix tokens make, for the one matrix product:

    dpos_embed = sum_b dout      dprefix_tokens = dpos_embed[:T]      dbias = sum_p dpos_embed[T + p]
    dweight = dout[:, T:]^T patches                                              (cuBLAS)

The sums are fp32, in an order that depends on the shapes alone. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deitfast.kernels.common import (
    INTERPRETED,
    Launch,
    aligned,
    architecture,
    autocast,
    check_dtypes,
    check_last_contiguous,
    check_same_or_fp32,
    check_shape,
    launch,
    op,
    runs_triton,
)
from deitfast.kernels.gemm_kernels import column_slices
from deitfast.kernels.replaced import replaceable
from deitfast.kernels.tunable import tunable

# Reference -----------------------------------------------------------------------------------------------------------


def patch_embed_reference(
    patches: Tensor, weight: Tensor, bias: Tensor, prefix_tokens: Tensor, pos_embed: Tensor
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm model takes. Any one floating dtype."""
    tokens_BPD = F.linear(patches, weight, bias)
    return torch.cat([prefix_tokens.expand(patches.shape[0], -1, -1), tokens_BPD], dim=1) + pos_embed


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def patch_embed_fwd_kernel(
    patches,  # (M, K), M = B P: pointer, or descriptor of blocks (BLOCK_M, BLOCK_K)
    weight,  # (D, K): pointer, or descriptor of blocks (BLOCK_D, BLOCK_K)
    bias,  # (D,)
    prefix_tokens,  # (PREFIX, D)
    pos_embed,  # (PREFIX + P, D)
    out,  # (B, PREFIX + P, D)
    stride_patches,
    stride_weight,
    M,
    D,
    K,
    P,
    PREFIX: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,  # 1, 2 or 4
):
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile_m, tile_d = tl.program_id(0) // tiles_d, tl.program_id(0) % tiles_d
    number = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = number.to(tl.int64)
    column = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if DESCRIPTORS:
            a = patches.load([tile_m * BLOCK_M, k])
            b = weight.load([tile_d * BLOCK_D, k]).T
        else:
            inner = k + tl.arange(0, BLOCK_K)
            a_mask = (row < M)[:, None] & (inner < K)[None, :]
            a = tl.load(patches + row[:, None] * stride_patches + inner[None, :], mask=a_mask, other=0.0)
            b_mask = (inner < K)[:, None] & (column < D)[None, :]
            b_offset = column.to(tl.int64)[None, :] * stride_weight + inner[:, None]
            b = tl.load(weight + b_offset, mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")

    image, patch = (number // P).to(tl.int64), number % P
    first = out + image * (PREFIX + P) * D  # of each row's image
    # In slices of columns, so that one slice's temporaries fit the registers beside the rest of the accumulator.
    slices = column_slices(acc, EPILOGUE_PARTS)
    WIDTH: tl.constexpr = BLOCK_D // EPILOGUE_PARTS
    for part in tl.static_range(EPILOGUE_PARTS):
        column = tile_d * BLOCK_D + part * WIDTH + tl.arange(0, WIDTH)
        mask = (row < M)[:, None] & (column < D)[None, :]
        position = (PREFIX + patch)[:, None] * D + column[None, :]
        tokens = slices[part] + tl.load(bias + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        tokens += tl.load(pos_embed + position, mask=mask, other=0.0).to(tl.float32)
        tl.store(first[:, None] + position, tokens.to(out.dtype.element_ty), mask=mask)
        for t in tl.static_range(PREFIX):
            token = tl.load(prefix_tokens + t * D + column, mask=column < D, other=0.0).to(tl.float32)
            token += tl.load(pos_embed + t * D + column, mask=column < D, other=0.0).to(tl.float32)
            token = tl.broadcast_to(token.to(out.dtype.element_ty)[None, :], (BLOCK_M, WIDTH))
            tl.store(first[:, None] + (t * D + column)[None, :], token, mask=mask & (patch == 0)[:, None])


@triton.jit
def patch_embed_bwd_kernel(
    dout,  # (B, WIDTH), WIDTH = (T + P) D
    drows,  # (B, WIDTH - prefix): dout without its first `prefix` columns
    sums,  # (programs along B, WIDTH) fp32
    B,
    WIDTH,
    prefix,
    BLOCK_B: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    acc = tl.zeros((BLOCK_B, BLOCK_W), tl.float32)
    for start in tl.range(tl.program_id(1) * BLOCK_B, B, tl.num_programs(1) * BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (row < B)[:, None] & (column < WIDTH)[None, :]
        values = tl.load(dout + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        acc += values.to(tl.float32)
        to = drows + row[:, None] * (WIDTH - prefix) + (column - prefix)[None, :]
        tl.store(to, values.to(drows.dtype.element_ty), mask=mask & (column >= prefix)[None, :])
    tl.store(sums + tl.program_id(1).to(tl.int64) * WIDTH + column, tl.sum(acc, 0), mask=column < WIDTH)


# Launchers -----------------------------------------------------------------------------------------------------------


def _tile(m: int, d: int, k: int, num_warps: int, num_stages: int, parts: int = 2) -> Launch:
    return Launch({"BLOCK_M": m, "BLOCK_D": d, "BLOCK_K": k, "EPILOGUE_PARTS": parts}, num_warps, num_stages)


_ANY_CHIP = {
    (4, 0): _tile(64, 64, 16, num_warps=4, num_stages=2),
    (2, 0): _tile(64, 64, 32, num_warps=4, num_stages=2, parts=4),
    (2, 64): _tile(128, 64, 32, num_warps=4, num_stages=3),
    (2, 128): _tile(128, 128, 32, num_warps=8, num_stages=3),
}
_TMA = _ANY_CHIP | {
    (2, 64): _tile(128, 64, 64, num_warps=4, num_stages=4),
    (2, 128): _tile(128, 128, 64, num_warps=8, num_stages=3, parts=4),
}
LAUNCHES: dict[int, dict[tuple[int, int], Launch]] = {
    0: _ANY_CHIP,
    80: _ANY_CHIP | {(2, 128): _tile(128, 128, 32, num_warps=8, num_stages=4)},
    90: _TMA,
    100: _TMA,
}
"""Architecture -> (bytes per element, columns of a tile; 0 for fp32 and for rows not aligned to 16 bytes) -> launch."""

BWD_LAUNCH = Launch({"BLOCK_B": 16, "BLOCK_W": 256}, num_warps=4, num_stages=2, programs=528)
"""Of the backward's pass: four programs for each multiprocessor, as many as fit on an A100 in fp32 (93 registers a
thread); fixed, so that no chip changes the sums."""

# Triton's interpreter pays for every operation, whatever the size of its tensors: there large tiles are fast.
INTERPRETER_LAUNCH = _tile(256, 256, 256, num_warps=4, num_stages=1, parts=1)
INTERPRETER_BWD_LAUNCH = Launch({"BLOCK_B": 2, "BLOCK_W": 1 << 15}, num_warps=4, num_stages=1, programs=528)


def _other_tiles(arch: int, itemsize: int, D: int, aligned_rows: bool) -> Iterator[Launch]:
    """The chip's other tiles."""
    if itemsize == 2 and aligned_rows:
        yield from (entry for (size, width), entry in LAUNCHES[arch].items() if size == itemsize and width)


@tunable(_other_tiles)
def patch_embed_launch(arch: int, itemsize: int, D: int, aligned_rows: bool) -> Launch:
    """The widest tile of the chip's table that divides D."""
    width = 0 if itemsize == 4 or not aligned_rows else 128 if D % 128 == 0 else 64
    return LAUNCHES[arch][itemsize, width]


def patch_embed_fwd(patches: Tensor, weight: Tensor, bias: Tensor, prefix_tokens: Tensor, pos_embed: Tensor) -> Tensor:
    """The op; out has the dtype of pos_embed."""
    (B, P, K), D, T = patches.shape, weight.shape[0], prefix_tokens.shape[0]
    out = torch.empty((B, T + P, D), dtype=pos_embed.dtype, device=patches.device)
    if not runs_triton(patches):
        torch.add(F.linear(patches, weight, bias), pos_embed[T:], out=out[:, T:])
        out[:, :T] = prefix_tokens + pos_embed[:T]
        return out
    rows = patches.reshape(B * P, K)
    arch = architecture(rows)
    aligned_rows = aligned(rows) and aligned(weight)
    entry = INTERPRETER_LAUNCH if INTERPRETED else patch_embed_launch(arch, rows.element_size(), D, aligned_rows)
    block_m, block_d, block_k = (entry.tiles[name] for name in ("BLOCK_M", "BLOCK_D", "BLOCK_K"))
    descriptors = aligned_rows and arch in (90, 100) and rows.element_size() == 2
    operands: tuple[Any, Any] = (rows, weight)
    if descriptors:
        operands = (
            TensorDescriptor.from_tensor(rows, [block_m, block_k]),
            TensorDescriptor.from_tensor(weight, [block_d, block_k]),
        )
    launch(
        patch_embed_fwd_kernel,
        (triton.cdiv(B * P, block_m) * triton.cdiv(D, block_d),),
        entry,
        patches=operands[0],
        weight=operands[1],
        bias=bias,
        prefix_tokens=prefix_tokens.contiguous(),
        pos_embed=pos_embed.contiguous(),
        out=out,
        stride_patches=rows.stride(0),
        stride_weight=weight.stride(0),
        M=B * P,
        D=D,
        K=K,
        P=P,
        PREFIX=T,
        DESCRIPTORS=descriptors,
    )
    return out


def _sum_and_copy(dout: Tensor, T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dout (B, T + P, D) contiguous -> its sum over B, (T + P, D) fp32, and dout[:, T:] as rows (B P, D) of `dtype`."""
    B, N, D = dout.shape
    if not runs_triton(dout):
        return dout.float().sum(0), dout[:, T:].reshape(B * (N - T), D).to(dtype)
    drows = torch.empty((B * (N - T), D), dtype=dtype, device=dout.device)
    entry = INTERPRETER_BWD_LAUNCH if INTERPRETED else BWD_LAUNCH
    columns = triton.cdiv(N * D, entry.tiles["BLOCK_W"])
    parts = max(1, min(triton.cdiv(entry.programs, columns), triton.cdiv(B, entry.tiles["BLOCK_B"])))
    sums = torch.empty((parts, N, D), dtype=torch.float32, device=dout.device)
    grid = (columns, parts)
    launch(patch_embed_bwd_kernel, grid, entry, dout=dout, drows=drows, sums=sums, B=B, WIDTH=N * D, prefix=T * D)
    return sums.sum(0), drows


# The op --------------------------------------------------------------------------------------------------------------


@op("patch_embed")
def _patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, prefix_tokens: Tensor, pos_embed: Tensor) -> Tensor:
    return patch_embed_fwd(patches, weight, bias, prefix_tokens, pos_embed)


@op("patch_embed_bwd")
def _patch_embed_bwd(
    dout: Tensor, patches: Tensor, prefix_count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums, drows = _sum_and_copy(dout.contiguous(), prefix_count, patches.dtype)
    dweight = drows.t() @ patches.reshape(drows.shape[0], patches.shape[-1])
    dbias = sums[prefix_count:].sum(0).to(patches.dtype)
    dprefix = sums[:prefix_count].to(dtype, copy=True)
    return dweight, dbias, dprefix, sums.to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    patches, _, _, prefix_tokens, _ = inputs
    ctx.save_for_backward(patches)
    ctx.prefix_count = prefix_tokens.shape[0]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (patches,) = ctx.saved_tensors
    return None, *_patch_embed_bwd(dout, patches, ctx.prefix_count, dout.dtype)


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


@replaceable(patch_embed_reference)
def patch_embed(patches: Tensor, weight: Tensor, bias: Tensor, prefix_tokens: Tensor, pos_embed: Tensor) -> Tensor:
    """The tokens (B, T + P, D) that enter the first block, in the dtype of `pos_embed`.

    patches (B, P, K); weight (D, K); bias (D,); prefix_tokens (T, D), T may be 0; pos_embed (T + P, D). bf16, fp16 or
    fp32; beside a 16-bit weight, prefix_tokens and pos_embed may be fp32. Under torch.autocast patches, weight and bias
    are cast, the others stay as they are. patches get no gradient.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    op = "patch_embed"
    if patches.ndim != 3:
        raise ValueError(f"{op}: patches have shape {tuple(patches.shape)}, expected (B, P, K)")
    if patches.requires_grad:
        raise ValueError(f"{op}: patches require a gradient, but they get none; detach them")
    patches, weight, bias = autocast(pos_embed, patches, weight, bias)
    _, P, K = patches.shape
    if weight.ndim != 2 or weight.shape[1] != K or weight.shape[0] == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (D, {K}): patches have {K} values")
    if prefix_tokens.ndim != 2:
        raise ValueError(f"{op}: prefix_tokens have shape {tuple(prefix_tokens.shape)}, expected (T, D)")
    D, T = weight.shape[0], prefix_tokens.shape[0]
    check_shape(op, "bias", bias, (D,))
    check_shape(op, "prefix_tokens", prefix_tokens, (T, D))
    check_shape(op, "pos_embed", pos_embed, (T + P, D))
    for name, tensor in (("patches", patches), ("weight", weight), ("bias", bias)):
        check_last_contiguous(op, name, tensor)
    check_dtypes(op, weight=weight, patches=patches, bias=bias)
    check_dtypes(op, pos_embed=pos_embed, prefix_tokens=prefix_tokens)
    check_same_or_fp32(op, "weight", weight, pos_embed=pos_embed)
    return _patch_embed(patches, weight, bias, prefix_tokens, pos_embed)
