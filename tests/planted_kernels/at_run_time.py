"""Kernels that compile and are wrong when they run; each is right where WRONG is false."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def missing_mask_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    """out (N,) = 2 x (N,); the last program stores whole blocks."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < N
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + offset, 2 * x, mask=inside | WRONG)


@triton.jit
def racing_sums_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    """out (programs,) = sums of blocks of x (N,); every program adds to the first one's element without an atomic."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offset, mask=offset < N, other=0.0), 0)
    target = out_ptr + (0 if WRONG else tl.program_id(0))
    tl.store(target, tl.load(target) + total)
