"""The matrix product with fused epilogues that every linear layer of the block runs on; no public op.

    forward   out = epilogue(a W^T)       a (M, K), W (N, K) as torch.nn.Linear keeps it
    backward  out = epilogue(a W)         W (K, N): the same kernel, reading the weight the other way

Epilogues, on the fp32 accumulator, rounded once when stored:

    bias        acc + bias
    gelu        h = acc + bias; out = gelu(h), and gelu'(h) for the backward where it is wanted, both times path_scale
    residual    residual + path_scale * gamma * (acc + bias)    path_scale per sample, gamma per channel, both optional;
                for some samples only (subset_rows.py), residual and out are those rows of the batch
    scaled      residual + acc + path_scale * bias, of rows of a that have their factor already
    gelu_grad   acc * gelu'(h), and its sums over each block of rows (the gradient of fc1's bias)

16-bit operands run on the tensor cores, read through tensor descriptors (TMA) on sm_90 and sm_100 wherever base and row
stride are multiples of 16 bytes, else through pointers and masks. fp32 is multiplied in fp32, never in tf32.

Programs go along a row of tiles first: those that run together share a few blocks of `a`, and the whole weight (at most
4.7 MB at DeiT-B) stays in L2. Two products of the backward have no epilogue, dX = dY W and dW = dY^T X; they are left
to cuBLAS (`torch.mm`; for fp32 operands PyTorch's own tf32 setting holds there). Not yet measured on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deitfast.kernels.common import (
    INTERPRETED,
    Launch,
    aligned,
    architecture,
    check_dtypes,
    check_last_contiguous,
    check_shape,
    launch,
    runs_triton,
)
from deitfast.kernels.gemm_kernels import linear_kernel, scale_and_sum_kernel
from deitfast.kernels.row_sums import row_sums
from deitfast.kernels.subset_rows import SubsetRows, branch_rows
from deitfast.kernels.tunable import tunable

# Launch tables -------------------------------------------------------------------------------------------------------

_MULTIPROCESSORS = {90: 132, 100: 148}


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int, parts: int = 0, programs: int = 0) -> Launch:
    accumulators = m * n // (32 * num_warps)  # a thread
    parts = parts or {128: 4, 64: 2}.get(accumulators, 1)
    tiles = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "EPILOGUE_PARTS": parts}
    return Launch(tiles, num_warps, num_stages, programs=programs)


_ANY_CHIP = {
    (4, 64): _tile(64, 64, 16, num_warps=4, num_stages=2),
    (2, 0): _tile(64, 64, 32, num_warps=4, num_stages=2, parts=2),  # pointers and masks take the registers
}
_NO_TMA = _ANY_CHIP | {  # GELU in one piece spills here, a residual in four does on sm_90
    (4, 64): _tile(64, 64, 16, num_warps=4, num_stages=2, parts=4),
}
_TMA = {
    (2, 64): _tile(128, 64, 64, num_warps=4, num_stages=4),
    (2, 128): _tile(128, 128, 64, num_warps=4, num_stages=3),
    (2, 256): _tile(128, 256, 64, num_warps=8, num_stages=3),
} | _ANY_CHIP
LAUNCHES: dict[int, dict[tuple[int, int], Launch]] = {
    0: _NO_TMA
    | {
        (2, 64): _tile(128, 64, 32, num_warps=4, num_stages=3),
        (2, 128): _tile(128, 128, 32, num_warps=8, num_stages=3),
    },
    80: _NO_TMA
    | {
        (2, 64): _tile(128, 64, 64, num_warps=4, num_stages=3),
        (2, 128): _tile(128, 128, 32, num_warps=8, num_stages=4),
    },
    90: _TMA | {(2, 256): _tile(128, 256, 64, num_warps=8, num_stages=4, programs=_MULTIPROCESSORS[90])},
    100: _TMA,
}
"""Architecture -> (bytes per element, columns of a tile; 0 for rows not aligned to 16 bytes) -> launch.

Tiles of 128 columns let two programs share a multiprocessor, so that the epilogue of one runs under the products of the
other; 256 columns read less and, where a program takes one tile, are for the light epilogues. On sm_90 the programs of
256 columns stay and take tiles in turns: a tile's first loads are issued under the epilogue of the one before. A layer
of 768 channels has but twelve steps a tile to hide them in.
"""


def _in_turns(arch: int) -> Iterator[Launch]:
    """Programs that stay and take tiles in turns, as many as fit the chip (H100, B200)."""
    if arch in _MULTIPROCESSORS:
        yield _tile(128, 256, 64, 8, 4, programs=_MULTIPROCESSORS[arch])
        yield _tile(128, 128, 64, 4, 3, programs=2 * _MULTIPROCESSORS[arch])


def _other_tiles(
    arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool
) -> Iterator[Launch | None]:
    """Programs that stay, or that take a tile each; cuBLAS, whose epilogue can add a bias; the chip's other tiles."""
    if itemsize == 2 and aligned_rows:
        yield from _in_turns(arch)
    if epilogue == "bias":
        yield None
    if itemsize == 2 and aligned_rows:
        yield from (entry for (size, width), entry in LAUNCHES[arch].items() if size == itemsize and width)
        yield from (_TMA[2, 256],) * (arch == 90)


def _all_tiles(arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool) -> Iterator[Launch | None]:
    """What a search tries, as far as it fits the shared memory of the chip."""
    if epilogue == "bias":
        yield None
    if itemsize == 4 or not aligned_rows:
        return
    yield from _in_turns(arch)
    room = {80: 163, 90: 227, 100: 227}.get(arch, 99) << 10
    tiles = ((128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (128, 64, 4), (64, 128, 4), (64, 256, 4))
    for (m, n, warps), (k, stages) in itertools.product(tiles, ((64, 3), (64, 4), (64, 2), (64, 5), (32, 5), (128, 2))):
        if stages * (m + n) * k * 2 <= room:
            yield _tile(m, n, k, warps, stages)


@tunable(_other_tiles, _all_tiles)
def linear_launch(arch: int, itemsize: int, N: int, K: int, epilogue: str, aligned_rows: bool) -> Launch | None:
    """The widest tile of the chip's table that divides N, else 128 columns; at most 128 with GELU but on sm_90.

    epilogue: the kernel's, and "bias" for a "linear" that adds no more than that; there None is cuBLAS. aligned_rows:
    whether the operands' rows are, as `aligned` says.
    """
    table = LAUNCHES[arch]
    if itemsize == 4:
        return table[4, 64]
    if not aligned_rows:
        return table[2, 0]
    limit = 256 if arch == 90 or epilogue in ("linear", "bias") else 128
    widths = (width for size, width in sorted(table, reverse=True) if size == itemsize and 0 < width <= limit)
    return table[itemsize, next((width for width in widths if N % width == 0), 128)]


SUM_LAUNCH = Launch({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=2, programs=1056)
"""Of the column sums: eight programs for each multiprocessor of an H100, so that none waits for a second round. Fixed,
so that no chip changes the sums."""
_ODD_SUM_LAUNCH = Launch({"BLOCK_M": 8, "BLOCK_N": 64}, num_warps=4, num_stages=2, programs=1056)
"""Where 16 does not divide the columns, as in no DeiT: an address for each value takes the registers of more rows."""


def _sums_space(N: int) -> Iterator[Launch]:
    for m, n, warps, blocks in itertools.product((16, 32, 64), (64, 128), (4, 8), (4, 8)):
        yield Launch({"BLOCK_M": m, "BLOCK_N": n}, warps, 2, programs=132 * blocks)


@tunable(lambda N: (), _sums_space)
def sums_launch(N: int) -> Launch:
    """Of the column sums of N columns."""
    if INTERPRETED:
        return INTERPRETER_SUM_LAUNCH
    return _ODD_SUM_LAUNCH if N % 16 else SUM_LAUNCH


# Triton's interpreter pays for every operation, whatever the size of its tensors: there large tiles are fast.
INTERPRETER_LAUNCH = Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "EPILOGUE_PARTS": 1}, 4, 1)
INTERPRETER_SUM_LAUNCH = Launch({"BLOCK_M": 64, "BLOCK_N": 512}, num_warps=4, num_stages=1, programs=1056)

# Launchers -----------------------------------------------------------------------------------------------------------


def _sample_arguments(M: int, path_scale: Tensor | None, subset: SubsetRows | None) -> dict[str, Any]:
    """The kernels' arguments about samples, for M rows of a branch."""
    if subset is not None:
        rows_per_sample = subset.rows_per_sample
        return {
            "path_scale": None,
            "subset": subset.samples,
            "rows_per_sample": rows_per_sample,
            "subset_scale": subset.scale,
        }
    rows_per_sample = 1 if path_scale is None else M // max(1, path_scale.numel())
    return {"path_scale": path_scale, "subset": None, "rows_per_sample": rows_per_sample, "subset_scale": 1.0}


def _aligned_rows(a: Tensor, b: Tensor, N: int) -> bool:
    """Whether the operands are aligned, and so a contiguous result (M, N)."""
    return aligned(a) and aligned(b) and N * a.element_size() % 16 == 0


def _entry(a: Tensor, b: Tensor, N: int, epilogue: str) -> Launch | None:
    if INTERPRETED:
        return INTERPRETER_LAUNCH
    return linear_launch(architecture(a), a.element_size(), N, a.shape[1], epilogue, _aligned_rows(a, b, N))


def _linear(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    transposed: bool,
    epilogue: str = "linear",
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
    subset: SubsetRows | None = None,
    derivative: Tensor | None = None,
    entry: Launch | None = None,
) -> Tensor | None:
    """Fill `out` (and `derivative`); return parts (any number, N) of its column sums for gelu_grad, else None.

    entry: None for the epilogue's own choice.
    """
    (M, K), N = a.shape, out.shape[1]
    entry = _entry(a, b, N, "linear" if epilogue == "scaled" else epilogue) if entry is None else entry
    assert entry is not None
    descriptors = architecture(a) in (90, 100) and a.element_size() == 2 and _aligned_rows(a, b, N)
    block_m, block_n, block_k = (entry.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    operands: tuple[Any, Any] = (a, b)
    if descriptors:
        b_block = [block_n, block_k] if transposed else [block_k, block_n]
        operands = (TensorDescriptor.from_tensor(a, [block_m, block_k]), TensorDescriptor.from_tensor(b, b_block))
    tiles_m = triton.cdiv(M, block_m)
    tiles = tiles_m * triton.cdiv(N, block_n)
    column_sums = None
    if epilogue == "gelu_grad":
        column_sums = torch.empty((tiles_m, N), dtype=torch.float32, device=a.device)
    launch(
        linear_kernel,
        (min(tiles, entry.programs) if entry.programs else tiles,),
        entry,
        a=operands[0],
        b=operands[1],
        bias=bias,
        residual=residual,
        gamma=gamma,
        derivative=derivative,
        out=out,
        column_sums=column_sums,
        stride_a=a.stride(0),
        stride_b=b.stride(0),
        stride_residual=0 if residual is None else residual.stride(0),
        M=M,
        N=N,
        K=K,
        **_sample_arguments(M, path_scale, subset),
        TRANSPOSED=transposed,
        DESCRIPTORS=descriptors,
        EPILOGUE=epilogue,
        EXACT_GELU=a.element_size() == 4,
        FLATTEN=entry.programs > 0,
    )
    return column_sums


def linear_fwd(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """a (M, K), weight (N, K), bias (N,) -> a W^T + bias (M, N)."""
    entry = _entry(a, weight, weight.shape[0], "bias") if runs_triton(a) else None
    if entry is None:
        return F.linear(a, weight, bias)
    out = torch.empty((a.shape[0], weight.shape[0]), dtype=a.dtype, device=a.device)
    _linear(a, weight, out, transposed=True, bias=bias, entry=entry)
    return out


def _rows_of(path_scale: Tensor, M: int) -> Tensor:
    """path_scale (B,) -> (M, 1): the factor of each row of a branch."""
    return path_scale.repeat_interleave(M // max(1, path_scale.numel()))[:, None]


def linear_gelu_fwd(
    a: Tensor, weight: Tensor, bias: Tensor | None, save: bool, path_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """gelu(h) and gelu'(h), (M, N), of h = a W^T + bias: a (M, K), weight (N, K), bias (N,); no gelu' unless `save`.

    path_scale (B,): both times the factor of the row's sample.
    """
    if not runs_triton(a):
        h = F.linear(a, weight, bias).float()
        factor = h.new_ones(1, 1) if path_scale is None else _rows_of(path_scale, h.shape[0])
        gelu = F.gelu(h) if path_scale is None else F.gelu(h).mul_(factor)
        derivative = torch.ops.aten.gelu_backward(factor.expand_as(h), h) if save else a.new_empty(0)
        return gelu.to(a.dtype), derivative.to(a.dtype)
    out = torch.empty((a.shape[0], weight.shape[0]), dtype=a.dtype, device=a.device)
    derivative = torch.empty_like(out) if save else out.new_empty(0)
    given = derivative if save else None
    _linear(a, weight, out, transposed=True, epilogue="gelu", bias=bias, derivative=given, path_scale=path_scale)
    return out, derivative


def linear_residual_fwd(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: SubsetRows | None = None,
    out: Tensor | None = None,
    scaled: bool = False,
) -> Tensor:
    """residual + path_scale * gamma * (a W^T + bias).

    a (M, K), weight (N, K), residual (M, N), gamma (N,), path_scale (B,). subset: residual has the rows of the batch,
    and the subset's are written in `out`, contiguous, like it, and returned. scaled: a has been multiplied by
    path_scale, which is left for the bias, and there is no gamma.
    """
    assert not scaled or (gamma is None and path_scale is not None)
    if not runs_triton(a):
        if scaled and path_scale is not None:
            branch = F.linear(a, weight)
            branch = branch if bias is None else branch + _rows_of(path_scale, a.shape[0]) * bias
            return branch.add_(residual).to(residual.dtype)
        branch = F.linear(a, weight, bias).to(residual.dtype)
        if gamma is not None:
            branch = branch * gamma
        if subset is not None:
            assert out is not None
            rows = subset.numbers()
            return out.index_copy_(0, rows, (residual[rows] + branch * subset.scale).to(out.dtype))
        if path_scale is not None:
            branch = branch * _rows_of(path_scale, a.shape[0])
        return branch.add_(residual).to(residual.dtype)
    if out is None:
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    samples: dict[str, Any] = {"path_scale": path_scale, "subset": subset}
    epilogue = "scaled" if scaled else "linear"
    _linear(a, weight, out, True, epilogue, bias=bias, residual=residual, gamma=gamma, **samples)
    return out


def linear_gelu_bwd(
    dgelu: Tensor, weight: Tensor, derivative: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """dh = (dgelu W) * gelu'(h) with dgelu (M, K), W (K, N), gelu' (M, N) -> dh (M, N), column sums (N,) of `dtype`."""
    if not runs_triton(dgelu):
        dh = (dgelu @ weight).mul_(derivative)
        return dh, dh.float().sum(0).to(dtype)
    dh = torch.empty_like(derivative)
    column_sums = _linear(dgelu, weight, dh, transposed=False, epilogue="gelu_grad", derivative=derivative)
    assert column_sums is not None
    return dh, row_sums(column_sums, dtype)


def scale_and_sum(
    dout: Tensor,
    dtype: torch.dtype,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
    subset: SubsetRows | None = None,
    sums_alone: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout (M, N) contiguous -> dout * path_scale and that * gamma, of `dtype`, and the first's column sums (N,) fp32.

    A tensor that would be equal to another is that other, not a copy. subset: dout has the rows of the batch, the
    results are of the subset's rows, times the factor of the branch. sums_alone: dout, dout and those sums.
    """
    if not runs_triton(dout):
        exact = dout if subset is None else dout[subset.numbers()] * subset.scale
        if path_scale is not None:
            exact = exact * _rows_of(path_scale, dout.shape[0])
        if sums_alone:
            return dout, dout, exact.float().sum(0)
        branch = exact.to(dtype)
        return branch, branch if gamma is None else (exact * gamma).to(dtype), exact.float().sum(0)
    M, N = branch_rows(dout, subset), dout.shape[1]
    copies = (path_scale is not None or subset is not None or dtype != dout.dtype) and not sums_alone
    branch = torch.empty((M, N), dtype=dtype, device=dout.device) if copies else dout
    scaled = torch.empty_like(branch) if gamma is not None else branch
    entry = sums_launch(N)
    block_m, block_n = entry.tiles["BLOCK_M"], entry.tiles["BLOCK_N"]
    columns = triton.cdiv(N, block_n)
    grid = (columns, max(1, min(triton.cdiv(entry.programs, columns), triton.cdiv(M, block_m))))
    column_sums = torch.empty((grid[1], N), dtype=torch.float32, device=dout.device)
    launch(
        scale_and_sum_kernel,
        grid,
        entry,
        dout=dout,
        gamma=gamma,
        branch=branch if copies else None,
        scaled=scaled if gamma is not None else None,
        column_sums=column_sums,
        M=M,
        N=N,
        **_sample_arguments(M, path_scale, subset),
    )
    return branch, scaled, row_sums(column_sums, torch.float32)


def check_linear(
    op: str, input_name: str, width: int, weight_name: str, weight: Tensor, bias_name: str, bias: Tensor | None
) -> None:
    """Raise unless weight (N, `width`) and bias (N,), or None, agree in shape, dtype and device."""
    if weight.ndim != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: {weight_name} has shape {tuple(weight.shape)}, expected (N, {width}) because {input_name} has "
            f"{width} channels"
        )
    check_last_contiguous(op, weight_name, weight)
    parameters = {weight_name: weight}
    if bias is not None:
        check_shape(op, bias_name, bias, (weight.shape[0],))
        check_last_contiguous(op, bias_name, bias)
        parameters[bias_name] = bias
    check_dtypes(op, **parameters)
