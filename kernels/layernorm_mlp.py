"""The MLP half of a block in one op: LayerNorm, MLP with exact GELU, and optionally LayerScale, drop-path and residual.

    branch = gelu(LayerNorm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias
    out = branch, or with residual=True x + keep * gamma * branch

x (..., D), fc1_weight (H, D), fc2_weight (O, H), O = D with a residual; gamma (D,), keep (B,) as in linear_residual.py.

One op rather than a chain, because its backward can then do what a chain cannot: multiply by gelu' in the epilogue that
computes the gradient of gelu(h), and add the residual's gradient while the LayerNorm backward writes dx.

Saved for the backward: x, mean and rstd (fp32), LayerNorm(x), gelu(h), gelu'(h); the output is not needed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import autocast, needs_grad, rows
from deitfast.kernels.gemm import (
    linear_fwd,
    linear_gelu_bwd,
    linear_gelu_fwd,
    linear_residual_bwd,
    linear_residual_fwd,
)
from deitfast.kernels.layernorm import check_layernorm, layernorm_bwd, layernorm_fwd
from deitfast.kernels.linear_residual import check_residual, linear_residual_reference
from deitfast.kernels.mlp_gelu import check_mlp, mlp_gelu_reference


def layernorm_mlp_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: bool = False,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm block takes. Any one floating dtype."""
    normed = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    if not residual:
        return mlp_gelu_reference(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    gelu = F.gelu(F.linear(normed, fc1_weight, fc1_bias))
    return linear_residual_reference(gelu, fc2_weight, fc2_bias, x, gamma, keep)


@torch.library.custom_op("deitfast::layernorm_mlp", mutates_args=(), device_types=("cpu", "cuda"))
def _layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    eps: float,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    normed, mean, rstd = layernorm_fwd(rows(x), ln_weight, ln_bias, eps, fc1_weight.dtype)
    gelu, derivative = linear_gelu_fwd(normed, fc1_weight, fc1_bias, save)
    if residual:
        out = linear_residual_fwd(gelu, fc2_weight, fc2_bias, rows(x), gamma, keep)
    else:
        out = linear_fwd(gelu, fc2_weight, fc2_bias)
    return out.view(*x.shape[:-1], fc2_weight.shape[0]), normed, mean, rstd, gelu, derivative


@_layernorm_mlp.register_fake
def _(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    eps: float,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    M, hidden = x.shape[:-1].numel(), fc1_weight.shape[0]
    out = (x if residual else fc1_weight).new_empty(*x.shape[:-1], fc2_weight.shape[0])
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    derivative = fc1_weight.new_empty((M, hidden) if save else 0)
    return out, fc1_weight.new_empty(M, x.shape[-1]), mean, rstd, fc1_weight.new_empty(M, hidden), derivative


@torch.library.custom_op("deitfast::layernorm_mlp_bwd", mutates_args=(), device_types=("cpu", "cuda"))
def _layernorm_mlp_bwd(
    dout: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gelu: Tensor,
    derivative: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout = rows(dout).contiguous()
    dbranch, dfc2_weight, dfc2_bias, dgamma = linear_residual_bwd(dout, gelu, fc2_weight, fc2_bias, gamma, keep)
    dh, dfc1_bias = linear_gelu_bwd(dbranch, fc2_weight, derivative)
    dfc1_weight = dh.t() @ normed
    dx, dln_weight, dln_bias = layernorm_bwd(
        dh @ fc1_weight, rows(x), ln_weight, mean, rstd, dresidual=dout if residual else None
    )
    dgamma = fc2_weight.new_empty(0) if dgamma is None else dgamma
    return (
        dx.view(x.shape),
        dln_weight,
        dln_bias,
        dfc1_weight,
        dfc1_bias.to(fc1_weight.dtype),
        dfc2_weight,
        dfc2_bias,
        dgamma,
    )


@_layernorm_mlp_bwd.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gelu: Tensor,
    derivative: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dln_weight, dln_bias = (ln_weight.new_empty(ln_weight.shape) for _ in range(2))
    dfc1_weight, dfc2_weight = (w.new_empty(w.shape) for w in (fc1_weight, fc2_weight))
    dfc1_bias, dfc2_bias = (w.new_empty(w.shape[0]) for w in (fc1_weight, fc2_weight))
    dgamma = fc2_weight.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)
    dx = x.new_empty(x.shape)
    return dx, dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dgamma


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ln_weight, _, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, keep, _, ctx.residual, _ = inputs
    ctx.save_for_backward(x, ln_weight, fc1_weight, fc2_weight, fc2_bias, gamma, keep, *output[1:])
    ctx.has_bias = (fc1_bias is not None, fc2_bias is not None)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    gradients = _layernorm_mlp_bwd(dout, *ctx.saved_tensors, ctx.residual)
    dx, dln_weight, dln_bias, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias, dgamma = gradients
    has_fc1_bias, has_fc2_bias = ctx.has_bias
    return (
        dx,
        dln_weight,
        dln_bias,
        dfc1_weight,
        dfc1_bias if has_fc1_bias else None,
        dfc2_weight,
        dfc2_bias if has_fc2_bias else None,
        dgamma if dgamma.numel() else None,
        *(None,) * 4,
    )


_layernorm_mlp.register_autograd(_backward, setup_context=_setup_context)


def layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: bool = False,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """LayerNorm and MLP; with residual=True the block's whole second half, x + keep * gamma * mlp(LayerNorm(x)).

    x (..., D); ln_weight, ln_bias (D,); fc1_weight (H, D); fc1_bias (H,) or None; fc2_weight (O, H); fc2_bias (O,) or
    None; with residual=True O = D, gamma (D,) or None and keep (B,) fp32 or None, B the first dimension. Returns
    (..., O) in the weights' dtype, or in that of x with a residual. bf16, fp16 or fp32; beside 16-bit weights x, the
    LayerNorm's parameters and gamma may be fp32. Under torch.autocast the two layers' weights and biases are cast, all
    else stays as it is. keep gets no gradient.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    op = "layernorm_mlp"
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = autocast(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_layernorm(op, x, ln_weight, ln_bias, "fc1_weight", fc1_weight)
    check_mlp(op, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if residual:
        if fc2_weight.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{op}: fc2_weight has shape {tuple(fc2_weight.shape)}, expected {x.shape[-1]} rows to add its output "
                f"to x of shape {tuple(x.shape)}"
            )
        check_residual(op, x, gamma, keep, "fc2_weight", fc2_weight)
    elif gamma is not None or keep is not None:
        raise ValueError(f"{op}: gamma and keep belong to the residual; pass residual=True")
    save = needs_grad(x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma)
    return _layernorm_mlp(
        x, ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, keep, eps, residual, save
    )[0]
