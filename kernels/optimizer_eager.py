"""The update of `deitfast.kernels.optimizer` for CPU tensors: torch's fused CPU kernels, or few passes in place.

On a CPU the host may read the norm, so that a step whose gradient is not finite simply returns. AdamW and SGD go
through PyTorch's own one-pass kernels, one call for the segments of each weight decay. Norms are added up block by
block, in double precision, so that they have the same bits however the blocks are spread over processes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Scalars


@torch.no_grad()
def update_eager(optimizer: Optimizer, buffers: FlatBuffers, scalars: Scalars) -> None:
    """One update of `buffers`, in place; the gradient is scaled in place where it is clipped."""
    b = buffers
    squares = b.of_all(_block_squares(b.grad)[None])
    b.norm.copy_(squares.sum(dtype=torch.float64).sqrt())
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


def _block_squares(flat: Tensor) -> Tensor:
    """Sum of squares of each block of `flat`, fp32."""
    return torch.linalg.vector_norm(flat.view(-1, BLOCK), dim=1, dtype=torch.float32).square()


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
    count = len(segments.segment_decay)
    segment = torch.repeat_interleave(torch.arange(count), segments.first_block.long().diff())
    weights, updates = squares.new_zeros(2, count).index_add_(1, segment, squares).sqrt().float()
    adapted = (segments.segment_decay != 0) & (weights > 0) & (updates > 0)
    b.ratios[:-1] = torch.where(adapted, weights / updates, 1.0)
    return b.ratios
