"""What the tests of the linear ops share: definitions in float64 and the comparison; inputs are the catalogue's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deitfast.kernels.catalogue import (
    Inputs,
    layernorm_attention_inputs,
    layernorm_mlp_inputs,
    layernorm_qkv_inputs,
    linear_residual_inputs,
    mlp_gelu_inputs,
)
from deitfast.kernels.layernorm_attention_op import layernorm_attention, layernorm_attention_reference
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp, layernorm_mlp_reference
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv, layernorm_qkv_reference
from deitfast.kernels.linear_residual_op import linear_residual, linear_residual_reference
from deitfast.kernels.mlp_gelu_op import mlp_gelu, mlp_gelu_reference
from tests.kernels.tolerance import assert_close_to_float64

# Definitions, written out --------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.einsum("...k,nk->...n", x, weight)
    return out if bias is None else out + bias


def layernorm_qkv64(x, ln_weight, ln_bias, weight, bias, eps=1e-6):
    return _linear(_norm(x, ln_weight, ln_bias, eps), weight, bias)


def mlp_gelu64(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    h = _linear(x, fc1_weight, fc1_bias)
    return _linear(h * torch.special.ndtr(h), fc2_weight, fc2_bias)


def linear_residual64(x, weight, bias, residual, gamma=None, path_scale=None):
    return _add(residual, _linear(x, weight, bias), gamma, path_scale)


def layernorm_mlp64(
    x,
    ln_weight,
    ln_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    eps=1e-6,
    residual=False,
    gamma=None,
    path_scale=None,
    subset=None,
    subset_scale=1.0,
):
    branch = mlp_gelu64(_norm(x, ln_weight, ln_bias, eps), fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _add(x, branch, gamma, _factors(x, path_scale, subset, subset_scale)) if residual else branch


def layernorm_attention64(
    x,
    ln_weight,
    ln_bias,
    qkv_weight,
    qkv_bias,
    proj_weight,
    proj_bias,
    num_heads,
    eps=1e-6,
    gamma=None,
    path_scale=None,
    subset=None,
    subset_scale=1.0,
):
    qkv = _linear(_norm(x, ln_weight, ln_bias, eps), qkv_weight, qkv_bias)
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k) * q.shape[-1] ** -0.5
    attended = torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v).flatten(-2)
    return _add(x, _linear(attended, proj_weight, proj_bias), gamma, _factors(x, path_scale, subset, subset_scale))


def _factors(x: Tensor, path_scale: Tensor | None, subset: Tensor | None, subset_scale: float) -> Tensor | None:
    """The branch's factor of each sample: path_scale, or, where some samples run through it, subset_scale and 0."""
    if subset is None:
        return path_scale
    return torch.tensor([subset_scale if i in subset.tolist() else 0.0 for i in range(len(x))]).to(x)


def _add(residual: Tensor, branch: Tensor, gamma: Tensor | None, path_scale: Tensor | None) -> Tensor:
    if gamma is not None:
        branch = gamma * branch
    if path_scale is not None:
        branch = torch.einsum("b,b...->b...", path_scale, branch)
    return residual + branch


# The ops ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """A public op, its eager reference, its definition in float64, and its inputs (draw, leading, two widths)."""

    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    inputs: Callable[..., Inputs]
    options: Mapping[str, Any]


OPS = {
    "layernorm_qkv": Op(layernorm_qkv, layernorm_qkv_reference, layernorm_qkv64, layernorm_qkv_inputs, {}),
    "mlp_gelu": Op(mlp_gelu, mlp_gelu_reference, mlp_gelu64, mlp_gelu_inputs, {}),
    "linear_residual": Op(linear_residual, linear_residual_reference, linear_residual64, linear_residual_inputs, {}),
    "layernorm_mlp": Op(
        layernorm_mlp, layernorm_mlp_reference, layernorm_mlp64, layernorm_mlp_inputs, {"residual": True}
    ),
}

"""The ops that take rows of any number and width."""

ATTENTION = Op(
    layernorm_attention, layernorm_attention_reference, layernorm_attention64, layernorm_attention_inputs, {}
)
HALVES = {"layernorm_attention": ATTENTION, "layernorm_mlp": OPS["layernorm_mlp"]}
"""The halves of a block. The first wants num_heads, (samples, tokens), and a width of whole heads."""


# Comparison ----------------------------------------------------------------------------------------------------------


def outputs_and_gradients(function: Callable[..., Tensor], inputs: Inputs, dout: Tensor, **options: Any) -> Inputs:
    """The output and the gradient of every input but path_scale, which gets none."""
    leaves = {
        name: None if tensor is None else tensor.detach().clone().requires_grad_(name != "path_scale")
        for name, tensor in inputs.items()
    }
    out = function(**leaves, **options)
    out.backward(dout.to(out.dtype))
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None and name != "path_scale"}
    return {"out": out.detach()} | gradients


def check(op: Op, inputs: Inputs, cancels: Callable[[Inputs, Tensor], Inputs] | None = None, **options: Any) -> None:
    """Output and all gradients: at most 2 and 3 times as far from float64 as eager PyTorch in the same dtype.

    cancels: inputs and dout in float64 -> by name, for results that cancel to about zero, tensors of the size of what
    cancels.
    """
    options = dict(op.options) | options
    inputs64 = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    with torch.no_grad():
        shape = op.exact(**inputs64, **options).shape
    dtype = next(tensor for name, tensor in inputs.items() if tensor is not None and name != "path_scale").dtype
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs64["x"].device, dtype)
    exact = outputs_and_gradients(op.exact, inputs64, dout, **options)
    eager = outputs_and_gradients(op.reference, inputs, dout, **options)
    actual = outputs_and_gradients(op.function, inputs, dout, **options)
    assert actual.keys() == eager.keys()
    magnitudes = {} if cancels is None else cancels(inputs64, dout.double())
    for name, result in actual.items():
        assert result is not None, f"{name} is missing"
        factor, magnitude = 2 if name == "out" else 3, magnitudes.get(name)
        assert_close_to_float64(name, result, exact[name], eager[name], factor, magnitude=magnitude)
