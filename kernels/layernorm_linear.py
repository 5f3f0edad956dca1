"""LayerNorm and the linear layer that follows it, in one kernel or in two; no public op.

    n = LayerNorm(x)      out = n W^T + bias, or gelu of it      x (M, K), W (N, K), out (M, N)

One kernel: a program normalises a block of rows, mean and rstd included, writes it, and multiplies it by the whole
weight, a tile of columns after the other; the block, 196 KB at DeiT-B, comes back out of the L2. Against a LayerNorm
pass and a product this saves a launch, the read of n and, above all, the time in which a pass waits for memory and the
tensor cores for nothing: the rows of one multiprocessor are normalised while the others multiply. The arithmetic is
that of the pass: the variance of the centred row, then a product of the rounded normalised rows.

Normalising each tile in registers, on its way from x into the product, was weighed and left: with one block on a
multiprocessor the statistics (twice over the rows) and some 320 issue slots a 128 x 256 x 64 step, beside 1,024 cycles
of tensor cores, cost about what the pass costs, for each of 9 to 12 tiles of columns again; and training wants n in
memory all the same, for the weight gradient.

Two kernels, where one is no gain on paper (`layernorm_linear_launch`): too few rows to give every multiprocessor a
block, or so wide that the blocks at work do not stay in the L2 between two tiles of columns. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deitfast.kernels.common import INTERPRETED, Launch, aligned, architecture, launch, runs_triton
from deitfast.kernels.gemm import INTERPRETER_LAUNCH, LAUNCHES, _tile, linear_fwd, linear_gelu_fwd
from deitfast.kernels.gemm_kernels import linear_tile
from deitfast.kernels.layernorm import layernorm_fwd, normalise_rows, subset_arguments
from deitfast.kernels.subset_rows import SubsetRows, branch_rows, copy_other_rows
from deitfast.kernels.tunable import tunable


@triton.jit
def layernorm_linear_kernel(
    x,  # (M, K), or all rows of the batch if `subset` is given
    ln_weight,  # (K,)
    ln_bias,  # (K,)
    subset,  # (samples,) int64 or None
    normed,  # (M, K): LayerNorm(x)
    a,  # normed, to be read: pointer, or descriptor of blocks (BLOCK_M, BLOCK_K)
    b,  # (N, K): pointer, or descriptor of blocks (BLOCK_N, BLOCK_K)
    bias,  # (N,) or None
    path_scale,  # (M / rows_per_sample,) or None: factor of gelu(h) and gelu'(h), not beside `subset`
    derivative,  # (M, N) or None: gelu'(h), written by "gelu"
    out,  # (M, N)
    mean,  # (M,) fp32
    rstd,  # (M,) fp32
    other_out,  # like x, or None without `subset`: its other rows are written
    stride_x,
    stride_b,
    M,
    N,
    D,  # = K
    K,  # samples of the subset
    rows_per_sample,
    other_rows,
    eps,
    DESCRIPTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "linear" or "gelu"
    EXACT_GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # normalised at once; divides BLOCK_M
    BLOCK_D: tl.constexpr,
):
    tl.assume(D > 0)
    program = tl.program_id(0)
    for first in tl.range(program * BLOCK_M, min(program * BLOCK_M + BLOCK_M, M), ROWS):
        normalise_rows(
            first,
            x,
            ln_weight,
            ln_bias,
            subset,
            normed,
            mean,
            rstd,
            stride_x,
            M,
            D,
            rows_per_sample,
            eps,
            ROWS,
            BLOCK_D,
        )
    if subset is not None:
        for first in tl.range(program * ROWS, other_rows, tl.num_programs(0) * ROWS):
            copy_other_rows(x, other_out, subset, first, stride_x, other_rows, K, D, rows_per_sample, ROWS, BLOCK_D)
    if DESCRIPTORS:
        _show_to_tma()
    tl.debug_barrier()
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(program * tiles_n, (program + 1) * tiles_n, flatten=True):
        linear_tile(
            tile, a, b, bias, None, None, path_scale, None, derivative, out, None, D, stride_b, 0,
            M, N, D, rows_per_sample, 1.0,
            True, DESCRIPTORS, EPILOGUE, EXACT_GELU, BLOCK_M, BLOCK_N, BLOCK_K, EPILOGUE_PARTS,
        )  # fmt: skip


@triton.jit
def _show_to_tma():
    """What this thread wrote in global memory is there for the TMA loads that follow the next barrier.

    They go by another proxy (PTX ISA, "Async proxy"), which a barrier alone does not order after ordinary writes.
    """
    tl.inline_asm_elementwise("fence.proxy.async; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


# Launch tables -------------------------------------------------------------------------------------------------------

_CHIPS = {80: (108, 40), 90: (132, 50), 100: (148, 126)}
"""Architecture -> multiprocessors, MB of L2, of A100, H100 and B200 (NVIDIA's data sheets)."""
_WIDE = {
    80: _tile(128, 256, 32, num_warps=8, num_stages=3),
    90: _tile(128, 256, 64, num_warps=8, num_stages=4),
    100: _tile(128, 256, 64, num_warps=8, num_stages=4),
}
"""One program a multiprocessor, for GELU too: of narrower tiles two share one, and so have twice the rows at work."""


def _one_kernel(tile: Launch, K: int) -> Launch:
    """The launch for that tile and K columns of x: 64 values a thread are normalised at once."""
    block = triton.next_power_of_2(K)
    normed_at_once = min(tile.tiles["BLOCK_M"], max(1, 64 * 32 * tile.num_warps // block))
    return replace(tile, tiles={**tile.tiles, "ROWS": normed_at_once, "BLOCK_D": block})


def _tiles(arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool) -> Iterator[Launch]:
    """Of the one kernel, the best bet first; none where it was not built for."""
    if itemsize == 2 and aligned_rows and arch in _CHIPS:
        if N % 256 == 0:
            yield _one_kernel(_WIDE[arch], K)
        yield _one_kernel(LAUNCHES[arch][2, 64 if N % 128 else 128], K)


def _others(arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool) -> Iterator[Launch | None]:
    yield from _tiles(arch, itemsize, N, K, epilogue, aligned_rows)
    yield None


@tunable(_others)
def layernorm_linear_launch(
    arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool
) -> Launch | None:
    """The launch of the one kernel, where there are rows enough (`fills`); None for two kernels."""
    tiles = _tiles(arch, itemsize, N, K, epilogue, aligned_rows)
    return next((tile for tile in tiles if _stays_in_cache(tile, arch, K * itemsize)), None)


def _stays_in_cache(tile: Launch, arch: int, bytes_a_row: int) -> bool:
    """Whether the blocks of rows at work take at most 3/5 of the L2: each is read again for every tile of columns."""
    multiprocessors, cache = _CHIPS[arch]
    programs = multiprocessors * (1 if tile.tiles["BLOCK_N"] == 256 else 2)
    return programs * tile.tiles["BLOCK_M"] * bytes_a_row <= 0.6 * cache * 2**20


def fills(arch: int, M: int) -> bool:
    """Whether blocks of 128 of M rows fill the multiprocessors, round after round, but for an eighth.

    An eighth is about what the pass costs that the one kernel saves.
    """
    multiprocessors, _ = _CHIPS.get(arch, (1, 0))
    blocks = triton.cdiv(M, 128)
    return blocks > 0 and 8 * blocks >= 7 * triton.cdiv(blocks, multiprocessors) * multiprocessors


# Launchers -----------------------------------------------------------------------------------------------------------


class Normed(NamedTuple):
    """What the backward of a LayerNorm wants: the normalised rows (M, K), mean and rstd (M,) in fp32."""

    rows: Tensor
    mean: Tensor
    rstd: Tensor


def layernorm_linear_fwd(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    subset: SubsetRows | None = None,
    other_out: Tensor | None = None,
) -> tuple[Tensor, Normed]:
    """LayerNorm(x) W^T + bias, (M, N), in the dtype of weight: x (M, K), weight (N, K), bias (N,).

    subset, other_out: as of `layernorm_fwd`.
    """
    entry = _entry(x, weight, "linear", subset)
    if entry is not None:
        return _launch(entry, x, ln_weight, ln_bias, eps, weight, bias, "linear", None, subset, other_out)
    normed = Normed(*layernorm_fwd(x, ln_weight, ln_bias, eps, weight.dtype, subset, other_out))
    return linear_fwd(normed.rows, weight, bias), normed


def layernorm_gelu_fwd(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    save: bool,
    subset: SubsetRows | None = None,
    other_out: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Normed]:
    """gelu(h) and gelu'(h), (M, N), of h = LayerNorm(x) W^T + bias; no gelu' unless `save`. As above otherwise.

    path_scale: as of `linear_gelu_fwd`; not beside `subset`.
    """
    entry = _entry(x, weight, "gelu", subset)
    if entry is not None:
        M, N = branch_rows(x, subset), weight.shape[0]
        derivative = weight.new_empty((M, N)) if save else None
        gelu, normed = _launch(
            entry, x, ln_weight, ln_bias, eps, weight, bias, "gelu", derivative, subset, other_out, path_scale
        )
        return gelu, weight.new_empty(0) if derivative is None else derivative, normed
    normed = Normed(*layernorm_fwd(x, ln_weight, ln_bias, eps, weight.dtype, subset, other_out))
    return *linear_gelu_fwd(normed.rows, weight, bias, save, path_scale), normed


def _entry(x: Tensor, weight: Tensor, epilogue: str, subset: SubsetRows | None) -> Launch | None:
    """The launch of the one kernel, None for two."""
    (N, K), M = weight.shape, branch_rows(x, subset)
    if not runs_triton(x) or M == 0:
        return None
    if INTERPRETED:
        return _one_kernel(INTERPRETER_LAUNCH, K)
    arch = architecture(x)
    if not fills(arch, M):
        return None
    aligned_rows = aligned(weight) and all(size * weight.element_size() % 16 == 0 for size in (N, K))
    return layernorm_linear_launch(arch, weight.element_size(), N, K, epilogue, aligned_rows)


def _launch(
    entry: Launch,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: str,
    derivative: Tensor | None,
    subset: SubsetRows | None,
    other_out: Tensor | None,
    path_scale: Tensor | None = None,
) -> tuple[Tensor, Normed]:
    (N, K), M = weight.shape, branch_rows(x, subset)
    out, normed = weight.new_empty((M, N)), weight.new_empty((M, K))
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    descriptors = architecture(x) in (90, 100) and all(aligned(tensor) for tensor in (normed, weight, out))
    operands: tuple[Any, Any] = (normed, weight)
    if descriptors:
        block_k = entry.tiles["BLOCK_K"]
        operands = (
            TensorDescriptor.from_tensor(normed, [entry.tiles["BLOCK_M"], block_k]),
            TensorDescriptor.from_tensor(weight, [entry.tiles["BLOCK_N"], block_k]),
        )
    samples = subset_arguments(x, subset)
    if path_scale is not None:
        samples["rows_per_sample"] = M // path_scale.numel()
    launch(
        layernorm_linear_kernel,
        (triton.cdiv(M, entry.tiles["BLOCK_M"]),),
        entry,
        x=x,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
        normed=normed,
        a=operands[0],
        b=operands[1],
        bias=bias,
        path_scale=path_scale,
        derivative=derivative,
        out=out,
        mean=mean,
        rstd=rstd,
        other_out=other_out,
        stride_x=x.stride(0),
        stride_b=weight.stride(0),
        M=M,
        N=N,
        D=K,
        eps=eps,
        **samples,
        DESCRIPTORS=descriptors,
        EPILOGUE=epilogue,
        EXACT_GELU=weight.element_size() == 4,
    )
    return out, Normed(normed, mean, rstd)
