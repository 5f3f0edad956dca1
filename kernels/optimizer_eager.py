"""The update of `deitfast.kernels.optimizer` in PyTorch: fast on CPU tensors, and by its formulas anywhere.

`update_eager` is for CPU tensors: torch's fused CPU kernels, or few passes in place.

On a CPU the host may read the norm, so that a step whose gradient is not finite simply returns. AdamW and SGD go
through PyTorch's own one-pass kernels, one call for the segments of each weight decay. Norms are added up block by
block, in double precision, so that they have the same bits however the blocks are spread over processes.

`update_reference` is what the kernels are compared with, and what runs where they are wrong: nothing is read on the
host, so a CUDA graph takes it; it needs room for six vectors of the weights' size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Scalars


@torch.no_grad()
def update_eager(optimizer: Optimizer, buffers: FlatBuffers, scalars: Scalars) -> None:
    """One update of `buffers`, in place; the gradient is scaled in place where it is clipped."""
    b = buffers
    b.norm.copy_(_norm(b))
    if not b.norm.isfinite():
        b.skipped += 1
        return
    grad = b.grad if b.grad.dtype == torch.float32 else b.grad.float()
    slack = 0.0 if optimizer == "lamb" else 1e-6
    if scalars.clip_norm and (factor := scalars.clip_norm / (float(b.norm) + slack)) < 1:
        grad.mul_(factor)
    {"adamw": _adamw, "lamb": _lamb, "sgd": _sgd}[optimizer](b, grad, scalars)
    b.steps.fill_(scalars.step)
    if b.ema is not None:
        b.ema.lerp_(b.master, scalars.ema_weight)
    if b.compute is not None:
        b.compute.copy_(b.master)


@torch.no_grad()
def update_reference(optimizer: Optimizer, buffers: FlatBuffers, scalars: Tensor) -> None:
    """One update of `buffers`, in place, on any device. scalars: as `update` takes them.

    Also in float64, where all of `buffers` and `scalars` is.
    """
    b, s = buffers, cast(Any, Scalars)(*scalars.unbind())
    p, m, decay = b.master.view(-1, BLOCK), b.exp_avg.view(-1, BLOCK), b.segments.block_decay[:, None]
    b.norm.copy_(_norm(b))
    slack = 0.0 if optimizer == "lamb" else 1e-6
    factor = torch.where(s.clip_norm > 0, (s.clip_norm / (b.norm + slack)).clamp(max=1), 1.0)
    g = b.grad.to(p.dtype).view(-1, BLOCK) * factor
    if optimizer == "sgd":
        g = g + decay * p
        new = {"exp_avg": s.beta1 * m + g}
        new["master"] = p - s.lr * (g + s.beta1 * new["exp_avg"])
    else:
        assert b.exp_avg_sq is not None
        new = {"exp_avg": m + s.one_minus_beta1 * (g - m)}
        new["exp_avg_sq"] = s.beta2 * b.exp_avg_sq.view(-1, BLOCK) + s.one_minus_beta2 * g * g
        u = new["exp_avg"] / s.bias_correction1 / (new["exp_avg_sq"].sqrt() / s.bias_correction2_sqrt + s.eps)
        if optimizer == "adamw":
            new["master"] = p * (1 - s.lr * decay) - s.lr * u
        else:
            u += decay * p
            new["master"] = p - s.lr * _trust_ratios(b, u)[b.segments.block_segment.long(), None] * u
    if b.ema is not None:
        average = b.ema.view(-1, BLOCK)
        new["ema"] = average + s.ema_weight * (new["master"] - average)
    finite = b.norm.isfinite()
    for name, value in new.items():
        buffer: Tensor = getattr(b, name)
        buffer.copy_(torch.where(finite, value.view(-1), buffer))
    b.steps.copy_(torch.where(finite, s.step, b.steps))
    b.skipped += ~finite
    if b.compute is not None:
        b.compute.copy_(b.master)


def _norm(b: FlatBuffers) -> Tensor:
    """Of the whole gradient, in float64."""
    return b.of_all(_block_squares(b.grad)[None]).sum(dtype=torch.float64).sqrt()


def _block_squares(flat: Tensor) -> Tensor:
    """Sum of squares of each block of `flat`, fp32; float64 of float64."""
    dtype = torch.promote_types(flat.dtype, torch.float32)
    return torch.linalg.vector_norm(flat.view(-1, BLOCK), dim=1, dtype=dtype).square()


def _by_decay(buffers: FlatBuffers, *flat: Tensor) -> list[tuple[float, list[list[Tensor]]]]:
    """(weight decay, for each of `flat` its segments with that decay) for every weight decay that occurs."""
    segments = buffers.segments
    parts = [tensor.split_with_sizes(segments.padded) for tensor in flat]
    return [
        (decay, [[part[i] for i, other in enumerate(segments.decays) if other == decay] for part in parts])
        for decay in dict.fromkeys(segments.decays)
    ]


def _adamw(b: FlatBuffers, grad: Tensor, s: Scalars) -> None:
    assert b.exp_avg_sq is not None
    for decay, (weights, grads, exp_avgs, exp_avg_sqs) in _by_decay(b, b.master, grad, b.exp_avg, b.exp_avg_sq):
        steps = list(torch.full((len(weights),), s.step - 1).unbind())
        adamw(
            weights, grads, exp_avgs, exp_avg_sqs, [], steps,
            fused=True, amsgrad=False, beta1=1 - s.one_minus_beta1, beta2=1 - s.one_minus_beta2, lr=s.lr,
            weight_decay=decay, eps=s.eps, maximize=False,
        )  # fmt: skip


def _sgd(b: FlatBuffers, grad: Tensor, s: Scalars) -> None:
    for decay, (weights, grads, momenta) in _by_decay(b, b.master, grad, b.exp_avg):
        sgd(
            weights, grads, list(momenta),
            fused=True, lr=s.lr, momentum=s.beta1, weight_decay=decay, dampening=0.0, nesterov=s.beta1 > 0,
            maximize=False,
        )  # fmt: skip


def _lamb(b: FlatBuffers, grad: Tensor, s: Scalars) -> None:
    assert b.exp_avg_sq is not None
    b.exp_avg.lerp_(grad, s.one_minus_beta1)
    b.exp_avg_sq.mul_(s.beta2).addcmul_(grad, grad, value=s.one_minus_beta2)
    direction = b.exp_avg_sq.sqrt().div_(s.bias_correction2_sqrt).add_(s.eps)
    torch.div(b.exp_avg, direction, out=direction).div_(s.bias_correction1)
    for decay, (weights, directions) in _by_decay(b, b.master, direction):
        if decay:
            torch._foreach_add_(directions, weights, alpha=decay)
    ratios = _trust_ratios(b, direction)
    direction.view(-1, BLOCK).mul_(ratios[b.segments.block_segment.long(), None])
    b.master.sub_(direction, alpha=s.lr)


def _trust_ratios(b: FlatBuffers, direction: Tensor) -> Tensor:
    """|weights| / |direction| of each segment, 1 where one of them is 0 or nothing is decayed, and 1 for padding."""
    segments = b.segments
    squares = b.of_all(torch.stack([_block_squares(b.master), _block_squares(direction)])).double()
    block = torch.arange(segments.blocks, device=squares.device)
    segment = torch.searchsorted(segments.first_block[1:].long(), block, right=True)
    sums = squares.new_zeros(2, len(segments.segment_decay)).index_add_(1, segment, squares)
    weights, updates = sums.sqrt().to(b.ratios.dtype)
    adapted = (segments.segment_decay != 0) & (weights > 0) & (updates > 0)
    b.ratios[:-1] = torch.where(adapted, weights / updates, 1.0)
    return b.ratios
