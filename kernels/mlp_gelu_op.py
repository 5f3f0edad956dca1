"""The two layers of the MLP with exact GELU in the epilogue of the first.

    h = x fc1_weight^T + fc1_bias      out = gelu(h) fc2_weight^T + fc2_bias      gelu(h) = h * Phi(h)

x (..., D), fc1_weight (H, D), fc2_weight (O, H), out (..., O).

Saved for the backward: x, gelu(h) and its derivative gelu'(h). Keeping h instead of gelu'(h) would take the same bytes
and compute Phi and phi again; with the derivative the epilogue of the backward is one multiplication. Where no gradient
is wanted gelu'(h) is not written. With g = dout:

    dh = (g W2) * gelu'(h)      dx = dh W1      dW1 = dh^T x      dW2 = g^T gelu(h)

fc1's bias gradient comes from the epilogue that computes dh, fc2's from one pass over g.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import (
    autocast,
    check_dtypes,
    check_last_contiguous,
    needed_gradients,
    needs_grad,
    op,
    rows,
)
from deitfast.kernels.gemm import check_linear, linear_fwd, linear_gelu_bwd, linear_gelu_fwd
from deitfast.kernels.linear_residual_op import linear_residual_bwd


def mlp_gelu_reference(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> Tensor:
    """The op in eager PyTorch: x (..., D), fc1_weight (H, D), fc2_weight (O, H) -> (..., O). Any one floating dtype."""
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


@op("mlp_gelu")
def _mlp_gelu(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gelu, derivative = linear_gelu_fwd(rows(x), fc1_weight, fc1_bias, save)
    out = linear_fwd(gelu, fc2_weight, fc2_bias).view(*x.shape[:-1], fc2_weight.shape[0])
    return out, gelu, derivative


@op("mlp_gelu_bwd")
def _mlp_gelu_bwd(
    dout: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    gelu: Tensor,
    derivative: Tensor,
    wanted1: bool,
    wanted2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout = rows(dout).contiguous()
    fc2 = linear_residual_bwd(dout, gelu, fc2_weight, None, None, None, wanted=wanted2)
    dh, dfc1_bias = linear_gelu_bwd(dout, fc2_weight, derivative, fc1_weight.dtype)
    dx = (dh @ fc1_weight).view(x.shape)
    dfc1_weight = dh.t() @ rows(x) if wanted1 else fc1_weight.new_empty(0)
    return dx, dfc1_weight, dfc1_bias, fc2.dweight, fc2.dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fc1_weight, _, fc2_weight, _, _ = inputs
    _, gelu, derivative = output
    ctx.save_for_backward(x, fc1_weight, fc2_weight, gelu, derivative)
    ctx.mark_non_differentiable(gelu, derivative)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    wanted1, wanted2 = ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:5])
    return needed_gradients(ctx, *_mlp_gelu_bwd(dout, *[*ctx.saved_tensors, wanted1, wanted2]), None)


_mlp_gelu.register_autograd(_backward, setup_context=_setup_context)


def check_mlp(
    op: str, x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> None:
    """Raise unless both layers of the MLP fit x (..., D) and each other."""
    check_linear(op, "x", x.shape[-1], "fc1_weight", fc1_weight, "fc1_bias", fc1_bias)
    check_linear(op, "the hidden layer", fc1_weight.shape[0], "fc2_weight", fc2_weight, "fc2_bias", fc2_bias)
    check_dtypes(op, fc1_weight=fc1_weight, fc2_weight=fc2_weight)


def mlp_gelu(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None
) -> Tensor:
    """fc2(gelu(fc1(x))) with the exact (erf) GELU: x (..., D) -> (..., O).

    x (..., D); fc1_weight (H, D); fc1_bias (H,) or None; fc2_weight (O, H); fc2_bias (O,) or None; all bf16, fp16 or
    fp32, one dtype. Under torch.autocast all are cast.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = autocast(x, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"mlp_gelu: x has shape {tuple(x.shape)}, expected (..., D) with D > 0")
    check_last_contiguous("mlp_gelu", "x", x)
    check_mlp("mlp_gelu", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_dtypes("mlp_gelu", fc1_weight=fc1_weight, x=x)
    save = needs_grad(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _mlp_gelu(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, save)[0]
