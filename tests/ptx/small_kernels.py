"""Kernels for the machine's own tests: each needs another part of it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def unmasked_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < n)


@triton.jit
def softmax_kernel(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * columns + i, mask=i < columns, other=float("-inf")).to(tl.float32)
    value = tl.exp(value - tl.max(value, 0))
    tl.store(out + row * columns + i, (value / tl.sum(value, 0)).to(out.dtype.element_ty), mask=i < columns)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, sa, sb0, sb1, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c (M, N) = a (M, K) b (K, N); b's strides sb0, sb1."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        x = tl.load(a + m[:, None] * sa + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        y = tl.load(b + k[:, None] * sb0 + n[None, :] * sb1, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def tma_matmul_kernel(a, b, c, K, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same through descriptors; b (N, K) where TRANSPOSED."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        y = b.load([n, k]).T if TRANSPOSED else b.load([k, n])
        acc = tl.dot(a.load([m, k]), y, acc)
    c.store([m, n], acc.to(c.dtype))


@triton.jit
def persistent_matmul_kernel(a, b, c, M, N, K, BLOCK: tl.constexpr):
    """c (M, N) = a (M, K) b (N, K)^T, several tiles a program."""
    columns = tl.cdiv(N, BLOCK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK) * columns, tl.num_programs(0), flatten=True):
        m, n = tile // columns * BLOCK, tile % columns * BLOCK
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in tl.range(0, K, BLOCK):
            acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
        row, column = m + tl.arange(0, BLOCK), n + tl.arange(0, BLOCK)
        mask = (row < M)[:, None] & (column < N)[None, :]
        tl.store(c + row[:, None] * N + column[None, :], acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def attend_kernel(q, k, v, out, D: tl.constexpr):
    """out (64, D) = softmax(q k^T / 8) v."""
    score = tl.dot(q.load([0, 0]), k.load([0, 0]).T) * 0.125
    p = tl.exp(score - tl.max(score, 1)[:, None])
    p = (p / tl.sum(p, 1)[:, None]).to(out.dtype.element_ty)
    offset = tl.arange(0, 64)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out + offset, tl.dot(p, v.load([0, 0])).to(out.dtype.element_ty))


@triton.jit
def double_kernel(a, c, tiles, ROWS: tl.constexpr):
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        c.store([tile * ROWS, 0], (a.load([tile * ROWS, 0]).to(tl.float32) * 2).to(c.dtype))


@triton.jit
def atomic_kernel(x, out, largest, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + i % 7, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)
    tl.atomic_max(largest + 0 * i, i, mask=i < n)


@triton.jit
def scan_kernel(x, total, order, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(total + i, tl.cumsum(value, 0))
    tl.store(order + i, tl.sort(value))


@triton.jit
def collatz_kernel(x, out):
    value = tl.load(x + tl.program_id(0))
    steps = 0
    while value > 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


@triton.jit
def integer_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b)
    tl.store(out + n + i, a % b)
    tl.store(out + 2 * n + i, tl.umulhi(a.to(tl.uint32), b.to(tl.uint32)).to(tl.int32))
    tl.store(out + 3 * n + i, (a >> 3) ^ (b << 5))
    tl.store(out + 4 * n + i, tl.maximum(a, b) - tl.minimum(a, b))
    tl.store(out + 5 * n + i, (a.to(tl.int64) * b.to(tl.int64) >> 16).to(tl.int32))


@triton.jit
def convert_kernel(x, out, back, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n).to(out.dtype.element_ty)
    tl.store(out + i, value, mask=i < n)
    tl.store(back + i, value.to(tl.float32), mask=i < n)


@triton.jit
def overlapping_kernel(x, out, n, BLOCK: tl.constexpr):
    """Neighbouring programs share an element."""
    i = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)
