"""One kernel that is right and one for each way the compile report must fail."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from deitfast.kernels.common import Launch, launch


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One (M, N) tile: a (M, K) bf16, b (K, N) bf16, c (M, N) bf16."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(tl.bfloat16))


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (ROWS,) fp32 = the row sums of x (ROWS, COLUMNS) fp32."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out_ptr + rows, tl.sum(tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :]), 1))


@triton.jit
def division_kernel(x_ptr, divisor, N: tl.constexpr):
    """x (N,) int64 = 0, 1, ... divided by `divisor`."""
    index = tl.arange(0, N).to(tl.int64)
    tl.store(x_ptr + index, index // divisor)


@triton.jit
def not_a_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.zeros((N + 1,), tl.float32))


@triton.jit(repr=lambda specialization: os._exit(11))
def crash_kernel(x_ptr, N: tl.constexpr):
    """The compiler process dies when it asks for the kernel's name."""
    tl.store(x_ptr + tl.arange(0, N), tl.zeros((N,), tl.float32))


MATMULS = {
    "good": Launch({"M": 64, "N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
    "spills": Launch({"M": 64, "N": 128, "BLOCK_K": 16}, num_warps=1, num_stages=1),
    "much shared memory": Launch({"M": 128, "N": 128, "BLOCK_K": 256}, num_warps=8, num_stages=4),
    "no wgmma": Launch({"M": 16, "N": 64, "BLOCK_K": 64}, num_warps=4, num_stages=2),
    "serialised": Launch({"M": 128, "N": 256, "BLOCK_K": 64}, num_warps=4, num_stages=3),
}


def matmul(entry: Launch) -> None:
    a, b, c = (torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(3))
    launch(matmul_kernel, (1,), entry, a_ptr=a, b_ptr=b, c_ptr=c, K=256)


def row_sum(programs: int = 0) -> None:
    x, entry = torch.empty(256), Launch({"ROWS": 1, "COLUMNS": 256}, 1, 1, programs=programs)
    launch(row_sum_kernel, (1,), entry, x_ptr=x, out_ptr=x)


def division() -> None:
    launch(division_kernel, (1,), Launch({"N": 128}, 4, 1), x_ptr=torch.empty(128, dtype=torch.int64), divisor=197)


def uses() -> None:
    for entry in MATMULS.values():
        matmul(entry)
    row_sum()
    for kernel in (not_a_kernel, crash_kernel):
        launch(kernel, (1,), Launch({"N": 16}, 4, 1), x_ptr=torch.empty(16))
