"""A linear layer that ends a branch of the block: bias, LayerScale, drop-path and the residual in its epilogue.

    out = residual + path_scale * gamma * (x weight^T + bias)

x (..., K), weight (D, K), bias (D,) or None, residual and out (..., D), gamma (D,) or None (LayerScale), path_scale
(B,) or None: one fp32 factor for each index of the first dimension, 0 or 1 / (1 - p) (drop-path).

Saved for the backward: x, nothing of the output. With g = dout * path_scale, one pass over dout writes g, g * gamma and
the column sums of g (only the sums where there is neither path_scale nor gamma):

    dresidual = dout      dx = (g * gamma) W      dW = gamma * (g^T x)      dbias = gamma * sum_m g
    dgamma = rowsum(W * (g^T x)) + bias * sum_m g

Scaling the rows of W by gamma instead would save the write of g * gamma, but its rounding is the same in every row of
dx and does not average out in the sums over rows that follow: in bf16 the bias gradients of the layer before come out
worse than eager PyTorch's.

The two halves of a block end in the same layer; there a branch may also run for some samples only (subset_rows.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import (
    autocast,
    check_dtypes,
    check_last_contiguous,
    check_same_or_fp32,
    check_shape,
    needed_gradients,
    op,
    rows,
)
from deitfast.kernels.gemm import check_linear, linear_residual_fwd, scale_and_sum
from deitfast.kernels.replaced import replaceable
from deitfast.kernels.subset_rows import SubsetRows


def linear_residual_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm block takes. Any one floating dtype."""
    branch = F.linear(x, weight, bias)
    if gamma is not None:
        branch = branch * gamma
    if path_scale is not None:
        branch = branch * path_scale.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))
    return residual + branch


class LinearGradients(NamedTuple):
    """What the backward of residual + path_scale * gamma * (a W^T + bias) starts with. The gradient of a: dlinear @ W.

    The gradients of the parameters are empty where they are not wanted, as is dgamma without a gamma.
    """

    dlinear: Tensor  # (M, N)
    sums: Tensor | None  # (N,) fp32, its column sums; None where nothing asked for them
    dweight: Tensor  # (N, K)
    dbias: Tensor  # (N,)
    dgamma: Tensor  # (N,)


def linear_residual_bwd(
    dout: Tensor,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: SubsetRows | None = None,
    wanted: bool = True,
    wants_sums: bool = False,
    scaled: bool = False,
) -> LinearGradients:
    """dout (M, N) contiguous, with the rows of the batch where `subset` is given; a (M, K), weight (N, K).

    wanted: False where neither weight, bias nor gamma wants a gradient. wants_sums: the column sums of dlinear even so.
    scaled: a has been multiplied by path_scale: dlinear is dout itself, and the bias gradient alone has a factor.
    """
    changes = gamma is not None or path_scale is not None or subset is not None or weight.dtype != dout.dtype
    changes = changes and not scaled
    g, dlinear, sums = dout, dout, None
    if wanted or wants_sums or changes:
        g, dlinear, sums = scale_and_sum(dout, weight.dtype, gamma, path_scale, subset, sums_alone=scaled)
    scaled_sums = sums if sums is None or gamma is None else gamma * sums
    if not wanted or sums is None or scaled_sums is None:
        return LinearGradients(dlinear, scaled_sums, *(weight.new_empty(0) for _ in range(3)))
    dweight, dbias = g.t() @ a, scaled_sums.to(weight.dtype)
    if gamma is None:
        return LinearGradients(dlinear, scaled_sums, dweight, dbias, weight.new_empty(0))
    dgamma = (weight.float() * dweight.float()).sum(1)
    if bias is not None:
        dgamma += bias * sums
    dweight = (dweight * gamma[:, None]).to(weight.dtype)
    return LinearGradients(dlinear, scaled_sums, dweight, dbias, dgamma.to(gamma.dtype))


@op("linear_residual")
def _linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None, path_scale: Tensor | None
) -> Tensor:
    return linear_residual_fwd(rows(x), weight, bias, rows(residual), gamma, path_scale).view(residual.shape)


@op("linear_residual_bwd")
def _linear_residual_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout = rows(dout).contiguous()
    found = linear_residual_bwd(dout, rows(x), weight, bias, gamma, path_scale, wanted=wanted)
    return (found.dlinear @ weight).view(x.shape), found.dweight, found.dbias, found.dgamma


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, gamma, path_scale = inputs
    ctx.save_for_backward(x, weight, bias, gamma, path_scale)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_weight, needs_bias, _, needs_gamma, _ = ctx.needs_input_grad
    wanted = needs_weight or needs_bias or needs_gamma
    dx, dweight, dbias, dgamma = _linear_residual_bwd(dout, *[*ctx.saved_tensors, wanted])
    return needed_gradients(ctx, dx, dweight, dbias, dout, dgamma, None)


_linear_residual.register_autograd(_backward, setup_context=_setup_context)


def check_residual(
    op: str, residual: Tensor, gamma: Tensor | None, path_scale: Tensor | None, weight_name: str, weight: Tensor
) -> None:
    """Raise unless residual (B, ..., D), gamma (D,) and path_scale (B,) fit a branch that ends in `weight` (D, K)."""
    check_last_contiguous(op, "residual", residual)
    given = {"residual": residual}
    if gamma is not None:
        check_shape(op, "gamma", gamma, (weight.shape[0],))
        check_last_contiguous(op, "gamma", gamma)
        given["gamma"] = gamma
    if path_scale is not None:
        if residual.ndim < 2:
            shape = tuple(residual.shape)
            raise ValueError(f"{op}: path_scale needs a batch dimension, but the residual has shape {shape}")
        check_shape(op, "path_scale", path_scale, (residual.shape[0],))
        check_last_contiguous(op, "path_scale", path_scale)
        if path_scale.dtype != torch.float32:
            raise TypeError(f"{op}: path_scale is {path_scale.dtype}, expected torch.float32")
        if path_scale.requires_grad:
            raise ValueError(f"{op}: path_scale requires a gradient, but it gets none; detach it")
        given["path_scale"] = path_scale
    check_same_or_fp32(op, weight_name, weight, **given)


@replaceable(linear_residual_reference)
def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
) -> Tensor:
    """residual + path_scale * gamma * (x weight^T + bias), in the dtype of `residual`.

    x (..., K); weight (D, K); bias (D,) or None; residual (..., D); gamma (D,) or None; path_scale (B,) fp32 or None,
    B the first dimension. bf16, fp16 or fp32; beside a 16-bit weight, residual and gamma may be fp32. Under
    torch.autocast x, weight and bias are cast, residual and gamma stay as they are. path_scale gets no gradient.
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
    check_residual(op, residual, gamma, path_scale, "weight", weight)
    return _linear_residual(x, weight, bias, residual, gamma, path_scale)
