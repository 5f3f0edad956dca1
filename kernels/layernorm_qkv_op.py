"""LayerNorm and the packed qkv projection.

    out = LayerNorm(x; ln_weight, ln_bias, eps) weight^T + bias

x (..., D), weight (O, D) with O = 3D for qkv but any width allowed, out (..., O).

Forward, one kernel: a program normalises a block of rows and multiplies it by the whole weight, the bias added in the
epilogue; two, where that is the better bet (layernorm_linear.py). Saved for the backward: x, the normalised rows, mean
and rstd (fp32). The rows are 1/16 of the activations that a block keeps; computing them again would cost one more write
of them in the backward. With n the normalised rows:

    dn = dout W      dx, dln_weight, dln_bias = LayerNorm backward of dn      dW = dout^T n      dbias = sum_m dout
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import autocast, needed_gradients, op, rows
from deitfast.kernels.gemm import check_linear
from deitfast.kernels.layernorm import check_layernorm, layernorm_bwd
from deitfast.kernels.layernorm_linear import layernorm_linear_fwd
from deitfast.kernels.linear_residual_op import linear_residual_bwd
from deitfast.kernels.replaced import replaceable


def layernorm_qkv_reference(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """The op in eager PyTorch: x (..., D), weight (O, D) -> (..., O). Any one floating dtype."""
    return F.linear(F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps), weight, bias)


@op("layernorm_qkv")
def _layernorm_qkv(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, normed = layernorm_linear_fwd(rows(x), ln_weight, ln_bias, eps, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0]), *normed


@op("layernorm_qkv_bwd")
def _layernorm_qkv_bwd(
    dout: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    weight: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout = rows(dout).contiguous()
    found = linear_residual_bwd(dout, normed, weight, None, None, None, wanted=wanted)
    dx, dln_weight, dln_bias = layernorm_bwd(found.dlinear @ weight, rows(x), ln_weight, mean, rstd)
    return dx.view(x.shape), dln_weight, dln_bias, found.dweight, found.dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ln_weight, _, weight, _, _ = inputs
    _, normed, mean, rstd = output
    ctx.save_for_backward(x, ln_weight, weight, normed, mean, rstd)
    ctx.mark_non_differentiable(normed, mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    wanted = any(ctx.needs_input_grad[3:5])
    return needed_gradients(ctx, *_layernorm_qkv_bwd(dout, *[*ctx.saved_tensors, wanted]), None)


_layernorm_qkv.register_autograd(_backward, setup_context=_setup_context)


@replaceable(layernorm_qkv_reference)
def layernorm_qkv(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm over D, then the packed qkv projection: x (..., D) -> (..., O), in the dtype of `weight`.

    x (..., D); ln_weight, ln_bias (D,); weight (O, D); bias (O,) or None. bf16, fp16 or fp32; beside a 16-bit weight, x
    and the LayerNorm's parameters may be fp32. Under torch.autocast weight and bias are cast, all else stays as it is.
    eps: added to the variance.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    weight, bias = autocast(x, weight, bias)
    check_layernorm("layernorm_qkv", x, ln_weight, ln_bias, "weight", weight)
    check_linear("layernorm_qkv", "x", x.shape[-1], "weight", weight, "bias", bias)
    return _layernorm_qkv(x, ln_weight, ln_bias, weight, bias, eps)[0]
