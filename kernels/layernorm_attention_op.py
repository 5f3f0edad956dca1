"""The attention half of a block in one op: LayerNorm, attention, projection, LayerScale, drop-path and residual.

    qkv = LayerNorm(x) qkv_weight^T + qkv_bias
    out = x + path_scale * gamma * (attention(qkv) proj_weight^T + proj_bias)

x (..., N, D), qkv_weight (3D, D), proj_weight (D, D); gamma (D,), path_scale (B,) as in linear_residual_op.py. With
subset (K,), the ascending indices of some samples, the branch runs for these alone, times subset_scale; the others have
out = x and dx = dout (subset_rows.py).

One op rather than a chain of three, because its backward then adds the residual's gradient while the LayerNorm backward
writes dx, where autograd would add it in a pass of its own.

Saved for the backward: x, mean and rstd (fp32), LayerNorm(x), qkv, attention(qkv), lse (fp32), all but x for the
samples of the subset alone; the output is not needed. With g = dout * path_scale and a = attention(qkv):

    da = (g * gamma) Wproj      dqkv = attention backward of da      dn = dqkv Wqkv      dWqkv = dqkv^T LayerNorm(x)
    dx = dout + LayerNorm backward of dn      dWproj = gamma * (g^T a)      dgamma as in linear_residual_op.py

Drop-path's factor s takes no pass of its own: the attention stores s * a, its backward takes dout Wproj and multiplies
by s on chip, and dWproj = dout^T (s a). With LayerScale, or a residual stream in fp32, g * gamma has to be written
anyway, and there the factor goes with it; and in fp32.

The gradient of qkv_bias, the sum of dqkv over all tokens, takes no pass over dqkv. Its part for v is the sum of da, as
each query's probabilities add up to 1, and so (gamma * sum_m g) Wproj; its part for k is zero, since a bias on the keys
shifts all scores of a query alike; its part for q comes from the attention's backward kernel, which has dq on chip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.attention_op import attention_bwd, attention_fwd, attention_reference, check_heads
from deitfast.kernels.common import autocast, check_dtypes, needed_gradients, op, rows, runs_triton
from deitfast.kernels.gemm import check_linear, linear_residual_fwd
from deitfast.kernels.layernorm import check_layernorm, layernorm_bwd
from deitfast.kernels.layernorm_linear import layernorm_linear_fwd
from deitfast.kernels.linear_residual_op import check_residual, linear_residual_bwd, linear_residual_reference
from deitfast.kernels.replaced import replaceable
from deitfast.kernels.row_sums import row_sums
from deitfast.kernels.subset_rows import add_subset, check_subset, subset_rows


def layernorm_attention_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
    subset: Tensor | None = None,
    subset_scale: float = 1.0,
) -> Tensor:
    """The op in eager PyTorch, in the steps a timm block takes. Any one floating dtype."""

    def attended(x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, eps)
        return attention_reference(F.linear(normed, qkv_weight, qkv_bias), num_heads)

    if subset is not None:
        return add_subset(x, subset, subset_scale, lambda x: F.linear(attended(x), proj_weight, proj_bias), gamma)
    return linear_residual_reference(attended(x), proj_weight, proj_bias, x, gamma, path_scale)


def _factor_of_sequences(
    x: Tensor, proj_weight: Tensor, gamma: Tensor | None, path_scale: Tensor | None
) -> Tensor | None:
    """Drop-path's factor of each sequence of x (B, ..., N, D), where the attention carries it.

    Not in fp32, whose kernels have no register left for it, nor in eager PyTorch.
    """
    if path_scale is None or gamma is not None or not runs_triton(x):
        return None
    if x.dtype == torch.float32 or x.dtype != proj_weight.dtype:
        return None
    return path_scale if x.ndim == 3 else path_scale.repeat_interleave(math.prod(x.shape[1:-2]))


@op("layernorm_attention")
def _layernorm_attention(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: Tensor | None,
    num_heads: int,
    eps: float,
    scale: float,
    subset_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch_rows, (tokens, width) = subset_rows(x, subset, subset_scale), x.shape[-2:]
    out = None if branch_rows is None else torch.empty((x.shape[:-1].numel(), width), dtype=x.dtype, device=x.device)
    sequences = math.prod(x.shape[:-2] if subset is None else (subset.shape[0], *x.shape[1:-2]))
    qkv, normed = layernorm_linear_fwd(rows(x), ln_weight, ln_bias, eps, qkv_weight, qkv_bias, branch_rows, out)
    qkv = qkv.view(sequences, tokens, 3 * width)
    factor = _factor_of_sequences(x, proj_weight, gamma, path_scale)
    attended, lse = attention_fwd(qkv, num_heads, scale, path_scale=factor)
    out = linear_residual_fwd(
        rows(attended), proj_weight, proj_bias, rows(x), gamma, path_scale, branch_rows, out, scaled=factor is not None
    )
    return out.view(x.shape), *normed, qkv, attended, lse


@op("layernorm_attention_bwd")
def _layernorm_attention_bwd(
    dout: Tensor,
    x: Tensor,
    ln_weight: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    path_scale: Tensor | None,
    subset: Tensor | None,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    subset_scale: float,
    wanted_qkv: bool,
    wanted_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout, branch_rows = rows(dout).contiguous(), subset_rows(x, subset, subset_scale)
    factor = _factor_of_sequences(x, proj_weight, gamma, path_scale)
    proj = linear_residual_bwd(
        dout,
        rows(attended),
        proj_weight,
        proj_bias,
        gamma,
        path_scale,
        branch_rows,
        wanted_proj,
        wants_sums=wanted_qkv,
        scaled=factor is not None,
    )
    dattended = (proj.dlinear @ proj_weight).view(attended.shape)
    dqkv, dq_sums = attention_bwd(
        dattended, qkv, attended, lse, num_heads, scale, wants_sums=wanted_qkv, path_scale=factor
    )
    dqkv = rows(dqkv)
    dqkv_weight, dqkv_bias = (qkv_weight.new_empty(0) for _ in range(2))
    if wanted_qkv and dq_sums is not None and proj.sums is not None:
        dqkv_weight, dqkv_bias = dqkv.t() @ normed, qkv_weight.new_zeros(qkv_weight.shape[0])
        row_sums(dq_sums, qkv_weight.dtype, out=dqkv_bias.narrow(0, 0, x.shape[-1]))
        row_sums(proj_weight, qkv_weight.dtype, proj.sums, out=dqkv_bias.narrow(0, 2 * x.shape[-1], x.shape[-1]))
    dx, dln_weight, dln_bias = layernorm_bwd(dqkv @ qkv_weight, rows(x), ln_weight, mean, rstd, dout, branch_rows)
    return dx.view(x.shape), dln_weight, dln_bias, dqkv_weight, dqkv_bias, proj.dweight, proj.dbias, proj.dgamma


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ln_weight, _, qkv_weight, _, proj_weight, proj_bias, gamma, path_scale, subset, *options = inputs
    num_heads, _, scale, subset_scale = options
    ctx.options = num_heads, scale, subset_scale
    ctx.save_for_backward(x, ln_weight, qkv_weight, proj_weight, proj_bias, gamma, path_scale, subset, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if dout is None:
        return (None,) * len(needs)
    wanted_qkv, wanted_proj = any(needs[3:5]), any(needs[5:8])
    gradients = _layernorm_attention_bwd(dout, *[*ctx.saved_tensors, *ctx.options, wanted_qkv, wanted_proj])
    return needed_gradients(ctx, *gradients, *(None,) * 6)


_layernorm_attention.register_autograd(_backward, setup_context=_setup_context)


@replaceable(layernorm_attention_reference)
def layernorm_attention(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    path_scale: Tensor | None = None,
    subset: Tensor | None = None,
    subset_scale: float = 1.0,
) -> Tensor:
    """A block's first half, x + path_scale * gamma * (attention(LayerNorm(x) Wqkv^T + bqkv) Wproj^T + bproj).

    x (..., N, D); ln_weight, ln_bias (D,); qkv_weight (3D, D); qkv_bias (3D,) or None; proj_weight (D, D); proj_bias
    (D,) or None; num_heads heads of a dimension in HEAD_DIMS; gamma (D,) or None; path_scale (B,) fp32 or None, B the
    first dimension. Returns (..., N, D) in the dtype of x. bf16, fp16 or fp32; beside 16-bit weights x, the LayerNorm's
    parameters and gamma may be fp32. Under torch.autocast the weights and biases of the two layers are cast, all else
    stays as it is. path_scale gets no gradient.
    subset: (K,) int64, instead of path_scale: the samples that the branch runs for, ascending and distinct (the values
    are not checked), times subset_scale; the others have out = x.
    eps: added to the variance.
    Raises ValueError for shapes, strides and devices that do not fit, TypeError for dtypes.
    """
    op = "layernorm_attention"
    qkv_weight, qkv_bias, proj_weight, proj_bias = autocast(x, qkv_weight, qkv_bias, proj_weight, proj_bias)
    if x.ndim < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., tokens, width)")
    check_layernorm(op, x, ln_weight, ln_bias, "qkv_weight", qkv_weight)
    width = x.shape[-1]
    check_linear(op, "x", width, "qkv_weight", qkv_weight, "qkv_bias", qkv_bias)
    check_linear(op, "the attention's output", width, "proj_weight", proj_weight, "proj_bias", proj_bias)
    for name, weight, expected in (("qkv_weight", qkv_weight, 3 * width), ("proj_weight", proj_weight, width)):
        if weight.shape[0] != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(weight.shape)}, expected {(expected, width)}")
    check_dtypes(op, qkv_weight=qkv_weight, proj_weight=proj_weight)
    scale = check_heads(op, width, num_heads, None)
    if x.ndim == 2 and (path_scale is not None or subset is not None):
        raise ValueError(f"{op}: path_scale and subset need a batch dimension, but x has shape {tuple(x.shape)}")
    check_residual(op, x, gamma, path_scale, "proj_weight", proj_weight)
    check_subset(op, x, path_scale, subset, subset_scale)
    parameters = ln_weight, ln_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma
    return _layernorm_attention(x, *parameters, path_scale, subset, num_heads, eps, scale, subset_scale)[0]
