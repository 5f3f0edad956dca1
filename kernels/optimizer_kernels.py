"""The Triton kernels of `deitfast.kernels.optimizer`, where the formulas are.

n elements, a multiple of BLOCK, in blocks that each belong to one of S segments. A program takes every
num_programs-th block; where the gradient's norm is not finite it takes none. `all` blocks are those of all processes,
where several share the work.
"""

from __future__ import annotations

from dataclasses import fields

import triton
import triton.language as tl

from deitfast.kernels.flat_buffers import Scalars

(
    LR, STEP, STEP_SIZE, BIAS_CORRECTION1, BIAS_CORRECTION2_SQRT, BETA1, ONE_MINUS_BETA1, BETA2, ONE_MINUS_BETA2, EPS,
    CLIP_NORM, EMA_WEIGHT,
) = (tl.constexpr(i) for i in range(len(fields(Scalars))))  # fmt: skip


@triton.jit
def block_squares_kernel(
    grad,  # (n,)
    squares,  # (blocks,) fp32
    blocks,
    BLOCK: tl.constexpr,
):
    for block in tl.range(tl.program_id(0).to(tl.int64), blocks, tl.num_programs(0)):
        g = tl.load(grad + block * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
        tl.store(squares + block, tl.sum(g * g, 0))


@triton.jit
def sum_squares_kernel(
    squares,  # (all,) fp32
    partials,  # (programs,) fp32
    blocks,  # all
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK, blocks, tl.num_programs(0) * BLOCK):
        block = start + tl.arange(0, BLOCK)
        total += tl.load(squares + block, mask=block < blocks, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def begin_update(partials, scalars, norm, skipped, steps, parts, slack: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """The norm's finiteness and the clip coefficient min(1, clip / (norm + slack)), in every program from the same sum.

    The first program writes down what this update did.
    """
    index = tl.arange(0, PARTS_BLOCK)
    value = tl.sqrt_rn(tl.sum(tl.load(partials + index, mask=index < parts, other=0.0), 0))
    finite = value < float("inf")
    if tl.program_id(0) == 0:
        tl.store(norm, value)
        tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
        tl.store(steps, tl.where(finite, tl.load(scalars + STEP), tl.load(steps)))
    clip = tl.load(scalars + CLIP_NORM)
    return finite, tl.where(clip > 0, tl.minimum(tl.div_rn(clip, value + slack), 1.0), 1.0)


@triton.jit
def store_weights(p, offset, master, ema, compute, ema_weight):
    """The new master weights, their average and their copy."""
    tl.store(master + offset, p)
    if ema is not None:
        average = tl.load(ema + offset)
        tl.store(ema + offset, average + ema_weight * (p - average))
    if compute is not None:
        tl.store(compute + offset, p.to(compute.dtype.element_ty))


@triton.jit
def adamw_kernel(
    grad,  # (n,)
    block_decay,  # (blocks,) fp32
    partials,  # (parts,) fp32
    scalars,  # (12,) fp32
    master,  # (n,) fp32
    exp_avg,  # (n,) fp32
    exp_avg_sq,  # (n,) fp32
    ema,  # (n,) fp32 or None
    compute,  # (n,) or None
    norm,  # () fp32
    skipped,  # () int64
    steps,  # () fp32
    parts,
    blocks,
    BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    finite, factor = begin_update(partials, scalars, norm, skipped, steps, parts, 1e-6, PARTS_BLOCK)
    lr, step_size, eps = tl.load(scalars + LR), tl.load(scalars + STEP_SIZE), tl.load(scalars + EPS)
    rise1, correction2 = tl.load(scalars + ONE_MINUS_BETA1), tl.load(scalars + BIAS_CORRECTION2_SQRT)
    beta2, rise2 = tl.load(scalars + BETA2), tl.load(scalars + ONE_MINUS_BETA2)
    ema_weight = tl.load(scalars + EMA_WEIGHT)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.where(finite, blocks, 0), tl.num_programs(0)):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + offset).to(tl.float32) * factor
        m, v, p = tl.load(exp_avg + offset), tl.load(exp_avg_sq + offset), tl.load(master + offset)
        m += rise1 * (g - m)
        v = v * beta2 + rise2 * g * g
        p *= 1.0 - lr * tl.load(block_decay + block)
        p -= step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
        tl.store(exp_avg + offset, m)
        tl.store(exp_avg_sq + offset, v)
        store_weights(p, offset, master, ema, compute, ema_weight)


@triton.jit
def sgd_kernel(
    grad,  # (n,)
    block_decay,  # (blocks,) fp32
    partials,  # (parts,) fp32
    scalars,  # (12,) fp32
    master,  # (n,) fp32
    exp_avg,  # (n,) fp32: the momentum
    ema,  # (n,) fp32 or None
    compute,  # (n,) or None
    norm,  # () fp32
    skipped,  # () int64
    steps,  # () fp32
    parts,
    blocks,
    BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    finite, factor = begin_update(partials, scalars, norm, skipped, steps, parts, 1e-6, PARTS_BLOCK)
    lr, momentum, ema_weight = tl.load(scalars + LR), tl.load(scalars + BETA1), tl.load(scalars + EMA_WEIGHT)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.where(finite, blocks, 0), tl.num_programs(0)):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        p, m = tl.load(master + offset), tl.load(exp_avg + offset)
        g = tl.load(grad + offset).to(tl.float32) * factor + tl.load(block_decay + block) * p
        m = momentum * m + g
        p -= lr * (g + momentum * m)
        tl.store(exp_avg + offset, m)
        store_weights(p, offset, master, ema, compute, ema_weight)


@triton.jit
def lamb_direction(m, v, p, decay, correction1, correction2, eps):
    """u before the trust ratio; correction2: the square root of the bias correction."""
    return tl.div_rn(tl.div_rn(m, correction1), tl.div_rn(tl.sqrt_rn(v), correction2) + eps) + decay * p


@triton.jit
def lamb_moments_kernel(
    grad,  # (n,)
    master,  # (n,) fp32
    block_decay,  # (blocks,) fp32
    partials,  # (parts,) fp32
    scalars,  # (12,) fp32
    exp_avg,  # (n,) fp32
    exp_avg_sq,  # (n,) fp32
    weight_squares,  # (blocks,) fp32
    update_squares,  # (blocks,) fp32
    norm,  # () fp32
    skipped,  # () int64
    steps,  # () fp32
    parts,
    blocks,
    BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    finite, factor = begin_update(partials, scalars, norm, skipped, steps, parts, 1e-30, PARTS_BLOCK)
    rise1, beta2, rise2 = (
        tl.load(scalars + ONE_MINUS_BETA1),
        tl.load(scalars + BETA2),
        tl.load(scalars + ONE_MINUS_BETA2),
    )
    correction1, correction2 = tl.load(scalars + BIAS_CORRECTION1), tl.load(scalars + BIAS_CORRECTION2_SQRT)
    eps = tl.load(scalars + EPS)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.where(finite, blocks, 0), tl.num_programs(0)):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + offset).to(tl.float32) * factor
        m, v, p = tl.load(exp_avg + offset), tl.load(exp_avg_sq + offset), tl.load(master + offset)
        m += rise1 * (g - m)
        v = v * beta2 + rise2 * g * g
        u = lamb_direction(m, v, p, tl.load(block_decay + block), correction1, correction2, eps)
        tl.store(exp_avg + offset, m)
        tl.store(exp_avg_sq + offset, v)
        tl.store(weight_squares + block, tl.sum(p * p, 0))
        tl.store(update_squares + block, tl.sum(u * u, 0))


@triton.jit
def lamb_ratio_kernel(
    segment_decay,  # (S,) fp32
    first_block,  # (S + 1,) int32
    weight_squares,  # (all,) fp32
    update_squares,  # (all,) fp32
    ratios,  # (S + 1,) fp32
    BLOCK: tl.constexpr,
):
    segment = tl.program_id(0)
    first, end = tl.load(first_block + segment), tl.load(first_block + segment + 1)
    weights, updates = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first, end, BLOCK):
        block = start + tl.arange(0, BLOCK)
        weights += tl.load(weight_squares + block, mask=block < end, other=0.0)
        updates += tl.load(update_squares + block, mask=block < end, other=0.0)
    weight_norm, update_norm = tl.sqrt_rn(tl.sum(weights, 0)), tl.sqrt_rn(tl.sum(updates, 0))
    adapted = (tl.load(segment_decay + segment) != 0.0) & (weight_norm > 0) & (update_norm > 0)
    tl.store(ratios + segment, tl.where(adapted, tl.div_rn(weight_norm, tl.where(adapted, update_norm, 1.0)), 1.0))


@triton.jit
def lamb_weights_kernel(
    exp_avg,  # (n,) fp32
    exp_avg_sq,  # (n,) fp32
    block_decay,  # (blocks,) fp32
    block_segment,  # (blocks,) int32
    ratios,  # (S + 1,) fp32
    norm,  # () fp32: this update's
    scalars,  # (12,) fp32
    master,  # (n,) fp32
    ema,  # (n,) fp32 or None
    compute,  # (n,) or None
    blocks,
    BLOCK: tl.constexpr,
):
    finite = tl.load(norm) < float("inf")
    lr, ema_weight = tl.load(scalars + LR), tl.load(scalars + EMA_WEIGHT)
    correction1, correction2 = tl.load(scalars + BIAS_CORRECTION1), tl.load(scalars + BIAS_CORRECTION2_SQRT)
    eps = tl.load(scalars + EPS)
    for block in tl.range(tl.program_id(0).to(tl.int64), tl.where(finite, blocks, 0), tl.num_programs(0)):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        p = tl.load(master + offset)
        m, v = tl.load(exp_avg + offset), tl.load(exp_avg_sq + offset)
        u = lamb_direction(m, v, p, tl.load(block_decay + block), correction1, correction2, eps)
        p -= lr * (u * tl.load(ratios + tl.load(block_segment + block)))
        store_weights(p, offset, master, ema, compute, ema_weight)
