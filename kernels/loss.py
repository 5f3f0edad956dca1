"""Losses of mixed images from two labels and lambda, without a target matrix: soft cross-entropy and binary.

Targets of row i, with a = labels[i], b = partner_labels[i], w = lam[i], smoothing s and C classes:

    cross-entropy   t_j = (1 - s) (w [j = a] + (1 - w) [j = b]) + s / C
                    loss = mean_i (log sum_j exp z_ij - sum_j t_j z_ij)          dz = (softmax(z) - t) dloss / B
    binary          t_j = 1 where w [j = a] + (1 - w) [j = b] > 0, else 0        (DeiT III; no smoothing)
                    loss = mean_ij (max(z, 0) - t z + log(1 + exp(-|z|)))        dz = (sigmoid(z) - t) dloss / (B C)

logits (B, C) fp32, bf16 or fp16; statistics, sums and losses in fp32. A program holds one row, in steps of at most
BLOCK_C classes, and the rows' losses are averaged by torch: the same bits in every run. Saved for the backward: the
logits, the labels and, for the cross-entropy, maximum and log of the sum of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import check_dtypes, check_last_contiguous, check_shape, op, runs_triton
from deitfast.kernels.loss_kernels import (
    launch_rows,
    mixed_bce_bwd_kernel,
    mixed_bce_fwd_kernel,
    mixed_cross_entropy_bwd_kernel,
    mixed_cross_entropy_fwd_kernel,
)
from deitfast.kernels.replaced import replaceable


def mixed_cross_entropy_reference(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, smoothing: float = 0.0
) -> Tensor:
    """The loss with its dense target matrix, in the dtype of the logits."""
    C = logits.shape[1]
    mixture = lam[:, None] * F.one_hot(labels, C) + (1 - lam[:, None]) * F.one_hot(partner_labels, C)
    target = (1 - smoothing) * mixture + smoothing / C
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()


def mixed_bce_reference(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    """The loss with its dense target matrix, in the dtype of the logits."""
    C = logits.shape[1]
    mixture = lam[:, None] * F.one_hot(labels, C) + (1 - lam[:, None]) * F.one_hot(partner_labels, C)
    return F.binary_cross_entropy_with_logits(logits, mixture.gt(0).to(logits.dtype))


def of_fp32_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The eager loss as autocast computes it: in fp32, whatever the logits are, unless they are more."""

    def of_wide_logits(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return loss(logits if logits.dtype == torch.float64 else logits.float(), *args, **kwargs)

    return of_wide_logits


# Cross-entropy -------------------------------------------------------------------------------------------------------


@op("mixed_cross_entropy")
def _mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_triton(logits):
        z = logits.float()
        row_max = z.amax(1)
        z = z - row_max[:, None]
        log_sum = z.exp().sum(1).log_()
        of_label, of_partner = (z.gather(1, index[:, None]).squeeze(1) for index in (labels, partner_labels))
        mixture = lam * of_label + (1 - lam) * of_partner
        return (log_sum - (1 - smoothing) * mixture - smoothing * z.mean(1)).mean(), row_max, log_sum
    losses, row_max, log_sum = (torch.empty_like(lam) for _ in range(3))
    kept = {"row_max": row_max, "log_sum": log_sum, "smoothing": smoothing}
    launch_rows(mixed_cross_entropy_fwd_kernel, logits, labels, partner_labels, lam, losses=losses, **kept)
    return losses.mean(), row_max, log_sum


@op("mixed_cross_entropy_bwd")
def _mixed_cross_entropy_bwd(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    lam: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    smoothing: float,
) -> Tensor:
    B, C = logits.shape
    if not runs_triton(logits):
        gradient = (logits.float() - row_max[:, None]).sub_(log_sum[:, None]).exp_().sub_(smoothing / C)
        gradient.scatter_add_(1, labels[:, None], (smoothing - 1) * lam[:, None])
        gradient.scatter_add_(1, partner_labels[:, None], (smoothing - 1) * (1 - lam[:, None]))
        return gradient.mul_(dloss / B).to(logits.dtype)
    dlogits = torch.empty((B, C), dtype=logits.dtype, device=logits.device)
    kept = {"row_max": row_max, "log_sum": log_sum, "smoothing": smoothing}
    gradients = {"dloss": dloss, "dlogits": dlogits}
    launch_rows(mixed_cross_entropy_bwd_kernel, logits, labels, partner_labels, lam, **gradients, **kept)
    return dlogits


def _setup_cross_entropy(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.smoothing = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _cross_entropy_backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _mixed_cross_entropy_bwd(dloss, *[*ctx.saved_tensors, ctx.smoothing]), None, None, None, None


_mixed_cross_entropy.register_autograd(_cross_entropy_backward, setup_context=_setup_cross_entropy)


# Binary cross-entropy ------------------------------------------------------------------------------------------------


def _dense_binary_targets(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    mixture = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
    mixture.scatter_add_(1, labels[:, None], lam[:, None])
    return mixture.scatter_add_(1, partner_labels[:, None], 1 - lam[:, None]).gt_(0)


@op("mixed_bce")
def _mixed_bce(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    if not runs_triton(logits):
        target = _dense_binary_targets(logits, labels, partner_labels, lam)
        return F.binary_cross_entropy_with_logits(logits.float(), target)
    losses = torch.empty_like(lam)
    launch_rows(mixed_bce_fwd_kernel, logits, labels, partner_labels, lam, losses=losses)
    return losses.mean()


@op("mixed_bce_bwd")
def _mixed_bce_bwd(dloss: Tensor, logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    if not runs_triton(logits):
        target = _dense_binary_targets(logits, labels, partner_labels, lam)
        return logits.float().sigmoid().sub_(target).mul_(dloss / logits.numel()).to(logits.dtype)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch_rows(mixed_bce_bwd_kernel, logits, labels, partner_labels, lam, dloss=dloss, dlogits=dlogits)
    return dlogits


def _setup_bce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bce_backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
    return _mixed_bce_bwd(dloss, *ctx.saved_tensors), None, None, None


_mixed_bce.register_autograd(_bce_backward, setup_context=_setup_bce)


# Public --------------------------------------------------------------------------------------------------------------


def _check(op: str, logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> None:
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"{op}: logits have shape {tuple(logits.shape)}, expected (B, C) with B and C > 0")
    check_dtypes(op, logits=logits)
    check_last_contiguous(op, "logits", logits)
    expected = {"labels": (labels, torch.int64), "partner_labels": (partner_labels, torch.int64)}
    for name, (tensor, dtype) in (expected | {"lam": (lam, torch.float32)}).items():
        check_shape(op, name, tensor, (logits.shape[0],))
        check_last_contiguous(op, name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but logits on {logits.device}; move one of them")
    if lam.requires_grad:
        raise ValueError(f"{op}: lam requires a gradient, but it gets none; detach it")


@replaceable(of_fp32_logits(mixed_cross_entropy_reference))
def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy with smoothed mixtures of two labels: fp32 scalar. See the module's docstring.

    logits (B, C) fp32, bf16 or fp16, any number of classes; labels, partner_labels (B,) int64; lam (B,) fp32, the share
    of labels; smoothing in [0, 1]. The gradient has the dtype of the logits, and only they get one.
    A label outside [0, C) makes the loss and its row's gradient NaN on a GPU, where the host may not look (nothing is
    read out of bounds); on CPU it is torch's error of `gather`.
    Raises ValueError for shapes, strides, devices and smoothing that do not fit, TypeError for dtypes.
    """
    op = "mixed_cross_entropy"
    _check(op, logits, labels, partner_labels, lam)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{op}: smoothing is {smoothing}, must be in [0, 1]")
    return _mixed_cross_entropy(logits, labels, partner_labels, lam, smoothing)[0]


@replaceable(of_fp32_logits(mixed_bce_reference))
def mixed_bce(logits: Tensor, labels: Tensor, partner_labels: Tensor, lam: Tensor) -> Tensor:
    """Mean binary cross-entropy over rows and classes, where the mixture's classes are 1 and all others 0: fp32 scalar.

    Arguments, gradient, labels out of range and errors: as for `mixed_cross_entropy`. The label counts where lam > 0,
    the partner's where lam < 1.
    """
    _check("mixed_bce", logits, labels, partner_labels, lam)
    return _mixed_bce(logits, labels, partner_labels, lam)
