"""The kernels behind gemm.py: the matrix product with its epilogues, and the pass that scales and sums a gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from deitfast.kernels.subset_rows import subset_row


@triton.jit
def gelu_with_derivative(h, EXACT: tl.constexpr):
    """gelu(h) = h * Phi(h) and gelu'(h) = Phi(h) + h * phi(h) of fp32 h, Phi and phi the standard normal's.

    EXACT: through erf. Otherwise Phi(-t) = phi(t) * R(t), R the Mills ratio as a polynomial of degree 10, fitted on
    [0, 6]: one exponential serves both results. The error of gelu is at most 0.07 ulp of fp16, 0.009 ulp of bf16.
    """
    phi = 0.3989422804014327 * tl.exp2(h * h * -0.7213475204444817)
    if EXACT:
        Phi = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
    else:
        t = tl.minimum(tl.abs(h), 6.0)
        mills = t * 2.8521691319838283e-07 - 1.025037909130333e-05
        mills = mills * t + 1.6318335838150233e-04
        mills = mills * t - 1.5239693457260728e-03
        mills = mills * t + 9.351528249680996e-03
        mills = mills * t - 4.024609178304672e-02
        mills = mills * t + 1.2771673500537872e-01
        mills = mills * t - 3.133071959018707e-01
        mills = mills * t + 6.190785765647888e-01
        mills = mills * t - 9.988096952438354e-01
        mills = mills * t + 1.253280758857727
        tail = phi * mills
        Phi = tl.where(h < 0, tail, 1.0 - tail)
    return h * Phi, Phi + h * phi


@triton.jit
def column_halves(x):
    """x (rows, columns) as its left and right half."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def column_slices(x, PARTS: tl.constexpr):
    """x (rows, columns) as a tuple of 1, 2 or 4 slices of columns, from left to right."""
    if PARTS == 1:
        slices = (x,)
    elif PARTS == 2:
        slices = column_halves(x)
    else:
        left, right = column_halves(x)
        slices = column_halves(left) + column_halves(right)
    return slices


@triton.jit
def linear_tile(
    tile,
    a,
    b,
    bias,
    residual,
    gamma,
    path_scale,
    subset,
    derivative,
    out,
    column_sums,
    stride_a,
    stride_b,
    stride_residual,
    M,
    N,
    K,
    rows_per_sample,
    subset_scale,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    EXACT_GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,
):
    """Tile number `tile`, along the rows of tiles: the product and its epilogue; arguments as of `linear_kernel`."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m = tile // tiles_n
    tile_n = tile % tiles_n
    number = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)  # to divide: 64 bits are for offsets, and cost a call to divide
    row = number.to(tl.int64)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if DESCRIPTORS:
            a_tile = a.load([tile_m * BLOCK_M, k])
            if TRANSPOSED:
                b_tile = b.load([tile_n * BLOCK_N, k]).T
            else:
                b_tile = b.load([k, tile_n * BLOCK_N])
        else:
            inner = k + tl.arange(0, BLOCK_K)
            a_mask = (row < M)[:, None] & (inner < K)[None, :]
            a_tile = tl.load(a + row[:, None] * stride_a + inner[None, :], mask=a_mask, other=0.0)
            b_mask = (inner < K)[:, None] & (column < N)[None, :]
            if TRANSPOSED:
                b_offset = column.to(tl.int64)[None, :] * stride_b + inner[:, None]
            else:
                b_offset = inner.to(tl.int64)[:, None] * stride_b + column[None, :]
            b_tile = tl.load(b + b_offset, mask=b_mask, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")

    row_out = row
    if subset is not None:
        row_out = subset_row(number, subset, rows_per_sample, number < M)

    # In slices of columns, so that one slice's temporaries fit the registers beside the rest of the accumulator.
    slices = column_slices(acc, EPILOGUE_PARTS)
    WIDTH: tl.constexpr = BLOCK_N // EPILOGUE_PARTS
    for part in tl.static_range(EPILOGUE_PARTS):
        h = slices[part]
        column = tile_n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
        mask = (row < M)[:, None] & (column < N)[None, :]
        offset = row[:, None] * N + column[None, :]
        if path_scale is not None:
            factor = tl.load(path_scale + number // rows_per_sample, mask=number < M, other=0.0).to(tl.float32)[:, None]
        if bias is not None:
            added = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            if EPILOGUE == "scaled":
                added *= factor
            h += added
        if EPILOGUE == "gelu":
            h, slope = gelu_with_derivative(h, EXACT_GELU)
            if derivative is not None:
                if path_scale is not None:
                    slope *= factor
                tl.store(derivative + offset, slope.to(derivative.dtype.element_ty), mask=mask)
        if EPILOGUE == "gelu_grad":
            h *= tl.load(derivative + offset, mask=mask, other=0.0).to(tl.float32)
            tl.store(column_sums + tile_m.to(tl.int64) * N + column, tl.sum(h, 0), mask=column < N)
        if gamma is not None:
            h *= tl.load(gamma + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if path_scale is not None and EPILOGUE != "scaled":
            h *= factor
        if subset is not None:
            h *= subset_scale
            offset = row_out[:, None] * N + column[None, :]
        if residual is not None:
            offset_residual = row_out[:, None] * stride_residual + column[None, :]
            h += tl.load(residual + offset_residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offset, h.to(out.dtype.element_ty), mask=mask)


@triton.jit
def linear_kernel(
    a,  # (M, K): pointer, or descriptor of blocks (BLOCK_M, BLOCK_K)
    b,  # (N, K) if TRANSPOSED, else (K, N): pointer, or descriptor of blocks (BLOCK_N, BLOCK_K) or (BLOCK_K, BLOCK_N)
    bias,  # (N,) or None
    residual,  # (M, N) or None; all rows of the batch if `subset` is given
    gamma,  # (N,) or None
    path_scale,  # (M / rows_per_sample,) or None
    subset,  # (M / rows_per_sample,) int64 or None
    derivative,  # (M, N): gelu'(h), written by "gelu" unless None, read by "gelu_grad"
    out,  # (M, N); all rows of the batch if `subset` is given, of which the subset's are written
    column_sums,  # (M / BLOCK_M rounded up, N) fp32, written by "gelu_grad"
    stride_a,
    stride_b,
    stride_residual,
    M,
    N,
    K,
    rows_per_sample,
    subset_scale,  # of the branch, where `subset` is given
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "linear" (with what is given), "scaled", "gelu" or "gelu_grad": see gemm.py
    EXACT_GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE_PARTS: tl.constexpr,  # 1, 2 or 4
    FLATTEN: tl.constexpr,  # programs take several tiles: as one loop, with the next one's loads under an epilogue
):
    tl.assume(K > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        linear_tile(
            tile, a, b, bias, residual, gamma, path_scale, subset, derivative, out, column_sums, stride_a, stride_b,
            stride_residual, M, N, K, rows_per_sample, subset_scale, TRANSPOSED, DESCRIPTORS, EPILOGUE, EXACT_GELU,
            BLOCK_M, BLOCK_N, BLOCK_K, EPILOGUE_PARTS,
        )  # fmt: skip


@triton.jit
def scale_and_sum_kernel(
    dout,  # (M, N), or all rows of the batch if `subset` is given
    gamma,  # (N,) or None
    path_scale,  # (M / rows_per_sample,) or None
    subset,  # (M / rows_per_sample,) int64 or None
    branch,  # (M, N) or None: dout * path_scale, or the subset's rows of dout * subset_scale
    scaled,  # (M, N) or None: branch * gamma
    column_sums,  # (programs along M, N) fp32: sums of branch
    M,
    N,
    rows_per_sample,
    subset_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(tl.program_id(1) * BLOCK_M, M, tl.num_programs(1) * BLOCK_M):
        number = start + tl.arange(0, BLOCK_M)
        row = number.to(tl.int64)
        mask = (row < M)[:, None] & (column < N)[None, :]
        offset = row[:, None] * N + column[None, :]
        row_dout = row
        if subset is not None:
            row_dout = subset_row(number, subset, rows_per_sample, number < M)
        values = tl.load(dout + row_dout[:, None] * N + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if subset is not None:
            values *= subset_scale
        if path_scale is not None:
            scale = tl.load(path_scale + number // rows_per_sample, mask=number < M, other=0.0).to(tl.float32)
            values *= scale[:, None]
        sums += values
        if branch is not None:
            tl.store(branch + offset, values.to(branch.dtype.element_ty), mask=mask)
        if scaled is not None:
            values *= tl.load(gamma + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
            tl.store(scaled + offset, values.to(scaled.dtype.element_ty), mask=mask)
    tl.store(column_sums + tl.program_id(1).to(tl.int64) * N + column, tl.sum(sums, 0), mask=column < N)
