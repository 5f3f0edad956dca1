"""Kernels that compile and are wrong when they run; each is right where WRONG is false."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy


@triton.jit
def missing_mask_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    """out (N,) = 2 x (N,); where wrong, the last program stores a whole block."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < N
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + offset, 2 * x, mask=inside | WRONG)


@triton.jit
def racing_sums_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    """out (programs,) += sums of blocks of x (N,); where wrong, every program adds to the first element."""
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offset, mask=offset < N, other=0.0), 0)
    target = out_ptr + (0 if WRONG else tl.program_id(0))
    tl.store(target, tl.load(target) + total)


@gluon.jit
def missing_wait_kernel(x_ptr, out_ptr, N: gl.constexpr, WRONG: gl.constexpr):
    """out (N,) = x (N,) through shared memory; where wrong, the copy there is waited for after it was read."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    offset = gl.arange(0, N, layout)
    buffer = gl.allocate_shared_memory(gl.float32, [N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_copy_global_to_shared(buffer, x_ptr + offset)
    async_copy.commit_group()
    if not WRONG:
        async_copy.wait_group(0)
    gl.store(out_ptr + offset, buffer.load(layout))
    async_copy.wait_group(0)
