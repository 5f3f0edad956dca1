"""The Triton kernels of `deitfast.kernels.loss`, where the formulas are: one program a row of logits (B, C)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import INTERPRETED, Launch, launch


def loss_launch(classes: int) -> Launch:
    """Classes a program holds at once: all up to 4096, on a chip; in the interpreter, which pays an operation, all."""
    block = triton.next_power_of_2(classes)
    block = block if INTERPRETED else min(block, 4096)
    return Launch({"BLOCK_C": block}, num_warps=min(8, max(1, block // 256)), num_stages=2)


@triton.jit
def log1p_of_unit(x):
    """log(1 + x) for 0 <= x <= 1 to about an ulp of the result: 2 artanh(x / (2 + x)) as a series."""
    s = x / (2.0 + x)
    q = s * s
    series = 1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17))
    series = 1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * series))
    return 2.0 * s * (1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * series)))


@triton.jit
def mixed_cross_entropy_fwd_kernel(
    logits,  # (B, C)
    labels,  # (B,) int64
    partner_labels,  # (B,) int64
    lam,  # (B,) fp32
    losses,  # (B,) fp32
    row_max,  # (B,) fp32
    log_sum,  # (B,) fp32
    stride_logits,
    C,
    smoothing,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    column = tl.arange(0, BLOCK_C)
    highest = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        z = tl.load(logits + start + column, mask=start + column < C, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, z)
    top = tl.max(highest, 0)
    exps, sums = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        mask = start + column < C
        z = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32) - top
        exps += tl.where(mask, tl.exp(z), 0.0)
        sums += tl.where(mask, z, 0.0)
    log_of_sum, mean = tl.log(tl.sum(exps, 0)), tl.sum(sums, 0) / C
    label, partner, weight = tl.load(labels + row), tl.load(partner_labels + row), tl.load(lam + row)
    valid = (label >= 0) & (label < C) & (partner >= 0) & (partner < C)
    of_label = tl.load(logits + label, mask=valid, other=float("nan")).to(tl.float32) - top
    of_partner = tl.load(logits + partner, mask=valid, other=float("nan")).to(tl.float32) - top
    mixture = weight * of_label + (1.0 - weight) * of_partner
    tl.store(losses + row, log_of_sum - (1.0 - smoothing) * mixture - smoothing * mean)
    tl.store(row_max + row, top)
    tl.store(log_sum + row, tl.where(valid, log_of_sum, float("nan")))


@triton.jit
def mixed_cross_entropy_bwd_kernel(
    dloss,  # () fp32
    logits,  # (B, C)
    labels,  # (B,) int64
    partner_labels,  # (B,) int64
    lam,  # (B,) fp32
    row_max,  # (B,) fp32
    log_sum,  # (B,) fp32
    dlogits,  # (B, C)
    stride_logits,
    C,
    smoothing,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    dlogits += row * C
    scale = tl.load(dloss) / tl.num_programs(0)
    label, partner, weight = tl.load(labels + row), tl.load(partner_labels + row), tl.load(lam + row)
    top, log_of_sum = tl.load(row_max + row), tl.load(log_sum + row)
    column = tl.arange(0, BLOCK_C)
    for start in tl.range(0, C, BLOCK_C):
        mask = start + column < C
        z = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
        mixture = tl.where(start + column == label, weight, 0.0) + tl.where(
            start + column == partner, 1.0 - weight, 0.0
        )
        target = (1.0 - smoothing) * mixture + smoothing / C
        gradient = scale * (tl.exp((z - top) - log_of_sum) - target)
        tl.store(dlogits + start + column, gradient.to(dlogits.dtype.element_ty), mask=mask)


@triton.jit
def binary_targets(column, label, partner, weight):
    """1.0 in the columns of the classes that the mixture contains, else 0.0."""
    of_label = tl.where(column == label, tl.where(weight > 0.0, 1.0, 0.0), 0.0)
    return tl.maximum(of_label, tl.where(column == partner, tl.where(weight < 1.0, 1.0, 0.0), 0.0))


@triton.jit
def mixed_bce_fwd_kernel(
    logits,  # (B, C)
    labels,  # (B,) int64
    partner_labels,  # (B,) int64
    lam,  # (B,) fp32
    losses,  # (B,) fp32
    stride_logits,
    C,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    label, partner, weight = tl.load(labels + row), tl.load(partner_labels + row), tl.load(lam + row)
    column = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        mask = start + column < C
        z = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
        target = binary_targets(start + column, label, partner, weight)
        # 0.5 (z + |z|) is max(z, 0), but keeps a NaN.
        loss = 0.5 * (z + tl.abs(z)) - z * target + log1p_of_unit(tl.exp(-tl.abs(z)))
        sums += tl.where(mask, loss, 0.0)
    valid = (label >= 0) & (label < C) & (partner >= 0) & (partner < C)
    tl.store(losses + row, tl.where(valid, tl.sum(sums, 0) / C, float("nan")))


@triton.jit
def mixed_bce_bwd_kernel(
    dloss,  # () fp32
    logits,  # (B, C)
    labels,  # (B,) int64
    partner_labels,  # (B,) int64
    lam,  # (B,) fp32
    dlogits,  # (B, C)
    stride_logits,
    C,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    dlogits += row * C
    label, partner, weight = tl.load(labels + row), tl.load(partner_labels + row), tl.load(lam + row)
    valid = (label >= 0) & (label < C) & (partner >= 0) & (partner < C)
    scale = tl.where(valid, tl.load(dloss) / tl.num_programs(0) / C, float("nan"))
    column = tl.arange(0, BLOCK_C)
    for start in tl.range(0, C, BLOCK_C):
        mask = start + column < C
        z = tl.load(logits + start + column, mask=mask, other=0.0).to(tl.float32)
        gradient = scale * (tl.sigmoid(z) - binary_targets(start + column, label, partner, weight))
        tl.store(dlogits + start + column, gradient.to(dlogits.dtype.element_ty), mask=mask)


def launch_rows(
    kernel: Any, logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, **arguments: Any
) -> None:
    """One program a row."""
    B, C = logits.shape
    sizes = {"stride_logits": logits.stride(0), "C": C}
    targets = {"labels": labels, "partner_labels": partner_labels, "lam": lam}
    launch(kernel, (B,), loss_launch(C), logits=logits, **targets, **sizes, **arguments)
