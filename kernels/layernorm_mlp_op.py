"""The MLP half of a block in one op: LayerNorm, MLP with exact GELU, and optionally LayerScale, drop-path and residual.

    branch = gelu(LayerNorm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias
    out = branch, or with residual=True x + path_scale * gamma * branch

x (..., D), fc1_weight (H, D), fc2_weight (O, H), O = D with a residual; gamma (D,), path_scale (B,) as in
linear_residual_op.py. With subset (K,), the ascending indices of some samples, the branch runs for these alone, times
subset_scale; the others have out = x and dx = dout (subset_rows.py).

One op rather than a chain, because its backward can then do what a chain cannot: multiply by gelu' in the epilogue that
computes the gradient of gelu(h), and add the residual's gradient while the LayerNorm backward writes dx.

Drop-path's factor takes no pass of its own: gelu(h) and gelu'(h) are stored times it. With g = dout, s the factor:

    out = x + (s gelu(h)) W2^T + s b2      dh = (g W2) * (s gelu'(h))      dW2 = g^T (s gelu(h))      db2 = sum_m s g

With LayerScale, or a residual stream in fp32, g * gamma has to be written anyway, and there the factor goes with it.

Saved for the backward: x, mean and rstd (fp32), LayerNorm(x), gelu(h), gelu'(h), all but x for the samples of
the subset alone; the output is not needed. With recompute=True x alone: the backward begins with LayerNorm, fc1 and
GELU again, the same kernels on the same values, and fc2's product is never repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deitfast.kernels.common import autocast, needed_gradients, needs_grad, op, rows
from deitfast.kernels.gemm import linear_fwd, linear_gelu_bwd, linear_residual_fwd
from deitfast.kernels.layernorm import check_layernorm, layernorm_bwd
from deitfast.kernels.layernorm_linear import layernorm_gelu_fwd
from deitfast.kernels.linear_residual_op import check_residual, linear_residual_bwd, linear_residual_reference
from deitfast.kernels.mlp_gelu_op import check_mlp, mlp_gelu_reference
from deitfast.kernels.replaced import replaceable
from deitfast.kernels.subset_rows import add_subset, check_subset, subset_rows


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
    path_scale: Tensor | None = None,
    subset: Tensor | None = None,
    subset_scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm block takes. Any one floating dtype."""
    if recompute:
        again = partial(
            layernorm_mlp_reference, eps=eps, residual=residual, gamma=gamma, path_scale=path_scale, subset=subset,
            subset_scale=subset_scale,
        )  # fmt: skip
        parameters = ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        return checkpoint(again, x, *parameters, use_reentrant=False, preserve_rng_state=False)
    if subset is not None:
        tensors = ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias
        return add_subset(x, subset, subset_scale, lambda x: layernorm_mlp_reference(x, *tensors, eps), gamma)
    normed = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
    if not residual:
        return mlp_gelu_reference(normed, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    gelu = F.gelu(F.linear(normed, fc1_weight, fc1_bias))
    return linear_residual_reference(gelu, fc2_weight, fc2_bias, x, gamma, path_scale)


def _factor_in_gelu(x: Tensor, fc2_weight: Tensor, gamma: Tensor | None, path_scale: Tensor | None) -> bool:
    """Whether gelu and gelu' carry drop-path's factor."""
    return path_scale is not None and gamma is None and x.dtype == fc2_weight.dtype


@op("layernorm_mlp")
def _layernorm_mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: Tensor | None,
    eps: float,
    residual: bool,
    subset_scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch_rows = subset_rows(x, subset, subset_scale)
    whole = x.shape[:-1].numel(), x.shape[-1]
    out = None if branch_rows is None else torch.empty(whole, dtype=x.dtype, device=x.device)
    scaled = _factor_in_gelu(x, fc2_weight, gamma, path_scale)
    factor = path_scale if scaled else None
    gelu, derivative, normed = layernorm_gelu_fwd(
        rows(x), ln_weight, ln_bias, eps, fc1_weight, fc1_bias, save, branch_rows, out, factor
    )
    if residual:
        out = linear_residual_fwd(gelu, fc2_weight, fc2_bias, rows(x), gamma, path_scale, branch_rows, out, scaled)
    else:
        out = linear_fwd(gelu, fc2_weight, fc2_bias)
    return out.view(*x.shape[:-1], fc2_weight.shape[0]), *normed, gelu, derivative


@op("layernorm_mlp_bwd")
def _layernorm_mlp_bwd(
    dout: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: Tensor | None,
    kept: Sequence[Tensor],  # what the forward returned but the output; empty: computed again here
    eps: float,
    residual: bool,
    subset_scale: float,
    wanted1: bool,
    wanted2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout, branch_rows = rows(dout).contiguous(), subset_rows(x, subset, subset_scale)
    scaled = _factor_in_gelu(x, fc2_weight, gamma, path_scale)
    if kept:
        normed, mean, rstd, gelu, derivative = kept
    else:
        others = None if branch_rows is None else torch.empty_like(rows(x))  # the other samples' x, read by nobody
        factor = path_scale if scaled else None
        gelu, derivative, (normed, mean, rstd) = layernorm_gelu_fwd(
            rows(x), ln_weight, ln_bias, eps, fc1_weight, fc1_bias, True, branch_rows, others, factor
        )
    fc2 = linear_residual_bwd(dout, gelu, fc2_weight, fc2_bias, gamma, path_scale, branch_rows, wanted2, scaled=scaled)
    dh, dfc1_bias = linear_gelu_bwd(fc2.dlinear, fc2_weight, derivative, fc1_weight.dtype)
    dfc1_weight = dh.t() @ normed if wanted1 else fc1_weight.new_empty(0)
    dx, dln_weight, dln_bias = layernorm_bwd(
        dh @ fc1_weight, rows(x), ln_weight, mean, rstd, dout if residual else None, branch_rows
    )
    return dx.view(x.shape), dln_weight, dln_bias, dfc1_weight, dfc1_bias, fc2.dweight, fc2.dbias, fc2.dgamma


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, eps, residual, subset_scale, save = inputs
    ctx.options = eps, residual, subset_scale
    ctx.save_for_backward(*tensors, *(output[1:] if save else ()))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dout is None:
        return (None,) * len(needs)
    wanted1, wanted2 = needs[3], any(needs[5:8])
    saved = ctx.saved_tensors  # read once: under checkpointing each read computes the block again
    gradients = _layernorm_mlp_bwd(dout, *[*saved[:10], saved[10:], *ctx.options, wanted1, wanted2])
    return needed_gradients(ctx, *gradients, *(None,) * 6)


_layernorm_mlp.register_autograd(_backward, setup_context=_setup_context)


@replaceable(layernorm_mlp_reference)
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
    path_scale: Tensor | None = None,
    subset: Tensor | None = None,
    subset_scale: float = 1.0,
    recompute: bool = False,
) -> Tensor:
    """LayerNorm and MLP; with residual=True the block's whole second half, x + path_scale * gamma * mlp(LayerNorm(x)).

    x (..., D); ln_weight, ln_bias (D,); fc1_weight (H, D); fc1_bias (H,) or None; fc2_weight (O, H); fc2_bias (O,) or
    None; with residual=True O = D, gamma (D,) or None and path_scale (B,) fp32 or None, B the first dimension. Returns
    (..., O) in the weights' dtype, or in that of x with a residual. bf16, fp16 or fp32; beside 16-bit weights x, the
    LayerNorm's parameters and gamma may be fp32. Under torch.autocast the two layers' weights and biases are cast, all
    else stays as it is. path_scale gets no gradient.
    subset: (K,) int64, instead of path_scale: the samples that the branch runs for, ascending and distinct (the values
    are not checked), times subset_scale; the others have out = x.
    eps: added to the variance.
    recompute: keep x alone for the backward, which computes what it needs of LayerNorm, fc1 and GELU again.
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
        check_residual(op, x, gamma, path_scale, "fc2_weight", fc2_weight)
        check_subset(op, x, path_scale, subset, subset_scale)
    elif gamma is not None or path_scale is not None or subset is not None:
        raise ValueError(f"{op}: gamma, path_scale and subset belong to the residual; pass residual=True")
    parameters = ln_weight, ln_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma
    save = not recompute and needs_grad(x, *parameters)
    return _layernorm_mlp(x, *parameters, path_scale, subset, eps, residual, subset_scale, save)[0]
