"""One kernel that is right and one for each way the compile report must fail."""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from deitfast.kernels.common import CompileCase


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
def not_a_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.zeros((N + 1,), tl.float32))


class KillsTheCompiler:
    """Stands for a kernel at which the compiler process dies."""

    @property
    def arg_names(self) -> list[str]:
        os._exit(11)


def matmul_case(
    name: str, m: int, n: int, block_k: int, num_warps: int, num_stages: int, matrix: bool = True
) -> CompileCase:
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*bf16", "K": "i32"}
    constexprs = {"M": m, "N": n, "BLOCK_K": block_k}
    return CompileCase(name, matmul_kernel, signature, constexprs, num_warps, num_stages, matrix)


def compile_cases(arch: int) -> list[CompileCase]:
    broken: Any = KillsTheCompiler()
    sums = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    return [
        matmul_case("good_matmul", m=64, n=64, block_k=64, num_warps=4, num_stages=2),
        CompileCase("good_row_sum", row_sum_kernel, sums, {"ROWS": 1, "COLUMNS": 256}, 1, 1, matrix=False),
        matmul_case("bad_spill", m=64, n=128, block_k=16, num_warps=1, num_stages=1, matrix=False),
        matmul_case("bad_shared_memory", m=128, n=128, block_k=256, num_warps=8, num_stages=4),
        matmul_case("bad_no_wgmma", m=16, n=64, block_k=64, num_warps=4, num_stages=2),
        matmul_case("bad_serialised", m=128, n=256, block_k=64, num_warps=4, num_stages=3),
        CompileCase("bad_syntax", not_a_kernel, {"x_ptr": "*fp32"}, {"N": 16}, 4, 1, matrix=False),
        CompileCase("bad_signature", row_sum_kernel, sums, {"ROWS": 1}, 1, 1, matrix=False),
        CompileCase("crash", broken, {}, {}, 4, 1, matrix=False),
    ]
