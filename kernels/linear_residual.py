"""A linear layer that ends a branch of the block: bias, LayerScale, drop-path and the residual in its epilogue.

    out = residual + keep * gamma * (x weight^T + bias)

x (..., K), weight (D, K), bias (D,) or None, residual and out (..., D), gamma (D,) or None (LayerScale), keep (B,) or
None: one fp32 factor for each index of the first dimension, 0 or 1 / (1 - p) (drop-path).

Saved for the backward: x, nothing of the output. With g = dout * keep, one pass over dout writes g, g * gamma and the
column sums of g (only the sums where there is neither keep nor gamma):

    dresidual = dout      dx = (g * gamma) W      dW = gamma * (g^T x)      dbias = gamma * sum_m g
    dgamma = rowsum(W * (g^T x)) + bias * sum_m g
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import autocast, check_dtypes, check_last_contiguous, check_same_or_fp32, check_shape, rows
from deitfast.kernels.gemm import check_linear, linear_residual_bwd, linear_residual_fwd


def linear_residual_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm block takes. Any one floating dtype."""
    branch = F.linear(x, weight, bias)
    if gamma is not None:
        branch = branch * gamma
    if keep is not None:
        branch = branch * keep.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))
    return residual + branch


@torch.library.custom_op("deitfast::linear_residual", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None, keep: Tensor | None
) -> Tensor:
    return linear_residual_fwd(rows(x), weight, bias, rows(residual), gamma, keep).view(residual.shape)


@_linear_residual.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None, keep: Tensor | None
) -> Tensor:
    return residual.new_empty(residual.shape)


@torch.library.custom_op("deitfast::linear_residual_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_residual_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = rows(dout).contiguous()
    dlinear, dweight, dbias, dgamma = linear_residual_bwd(dout, rows(x), weight, bias, gamma, keep)
    return (dlinear @ weight).view(x.shape), dweight, dbias, weight.new_empty(0) if dgamma is None else dgamma


@_linear_residual_bwd.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgamma = weight.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]), dgamma


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gamma, keep = inputs
    ctx.save_for_backward(x, weight, bias, gamma, keep)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, keep = ctx.saved_tensors
    dx, dweight, dbias, dgamma = _linear_residual_bwd(dout, x, weight, bias, gamma, keep)
    return dx, dweight, None if bias is None else dbias, dout, None if gamma is None else dgamma, None


_linear_residual.register_autograd(_backward, setup_context=_setup_context)


def check_residual(
    op: str, residual: Tensor, gamma: Tensor | None, keep: Tensor | None, weight_name: str, weight: Tensor
) -> None:
    """Raise unless residual (B, ..., D), gamma (D,) and keep (B,) fit a branch that ends in `weight` (D, K)."""
    check_last_contiguous(op, "residual", residual)
    given = {"residual": residual}
    if gamma is not None:
        check_shape(op, "gamma", gamma, (weight.shape[0],))
        check_last_contiguous(op, "gamma", gamma)
        given["gamma"] = gamma
    if keep is not None:
        if residual.ndim < 2:
            raise ValueError(f"{op}: keep needs a batch dimension, but the residual has shape {tuple(residual.shape)}")
        check_shape(op, "keep", keep, (residual.shape[0],))
        check_last_contiguous(op, "keep", keep)
        if keep.dtype != torch.float32:
            raise TypeError(f"{op}: keep is {keep.dtype}, expected torch.float32")
        if keep.requires_grad:
            raise ValueError(f"{op}: keep requires a gradient, but it gets none; detach it")
        given["keep"] = keep
    check_same_or_fp32(op, weight_name, weight, **given)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """residual + keep * gamma * (x weight^T + bias), in the dtype of `residual`.

    x (..., K); weight (D, K); bias (D,) or None; residual (..., D); gamma (D,) or None; keep (B,) fp32 or None, B the
    first dimension. bf16, fp16 or fp32; beside a 16-bit weight, residual and gamma may be fp32. Under torch.autocast x,
    weight and bias are cast, residual and gamma stay as they are. keep gets no gradient.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    op = "linear_residual"
    x, weight, bias = autocast(residual, x, weight, bias)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has shape (), expected (..., K)")
    check_linear(op, "x", x.shape[-1], "weight", weight, "bias", bias)
    check_last_contiguous(op, "x", x)
    check_dtypes(op, weight=weight, x=x)
    check_shape(op, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    check_residual(op, residual, gamma, keep, "weight", weight)
    return _linear_residual(x, weight, bias, residual, gamma, keep)
