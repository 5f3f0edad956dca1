"""The ops that the micro benchmarks time: how each is called, its eager reference, its inputs, and its least work.

Inputs are distributed as in a trained DeiT: activations of about unit size, weights of std .02 or 1/sqrt(width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.fused import BlockTensors, fused_block_forward
from deitfast.kernels.attention import attention, attention_reference
from deitfast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from deitfast.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_reference
from deitfast.kernels.layernorm_qkv import layernorm_qkv, layernorm_qkv_reference
from deitfast.kernels.linear_residual import linear_residual, linear_residual_reference
from deitfast.kernels.mlp_gelu import mlp_gelu, mlp_gelu_reference

MODELS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
"""DeiT's sizes: width and heads."""
EPS = 1e-6
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """One size of an op: a DeiT model, tokens a sample, samples."""

    model: str
    tokens: int
    batch: int

    @property
    def width(self) -> int:
        return MODELS[self.model][0]

    @property
    def heads(self) -> int:
        return MODELS[self.model][1]

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    def key(self) -> dict[str, Any]:
        return {"model": self.model, "tokens": self.tokens, "batch": self.batch}

    def __str__(self) -> str:
        return f"{self.model} {self.batch} x {self.tokens}"


@dataclass(frozen=True)
class Work:
    """The least a call must do: floating-point operations of its matrix products, elements it must read or write."""

    forward_flops: float
    forward_elements: float
    backward_flops: float
    backward_elements: float

    def total(self, backward: bool, itemsize: int) -> tuple[float, float]:
        """FLOPs and bytes of the forward, or of forward and backward."""
        flops = self.forward_flops + backward * self.backward_flops
        return flops, itemsize * (self.forward_elements + backward * self.backward_elements)


def _no_options(shape: Shape) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Op:
    """One op. fused, reference: the same keyword arguments, named as in `inputs`, plus `options(shape)`.

    per_sample: inputs whose first dimension is the batch; `keep` is the one input without a gradient.
    """

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[Draw, Shape], Tensors]
    work: Callable[[Shape], Work]
    options: Callable[[Shape], Mapping[str, Any]] = field(default=_no_options)
    per_sample: frozenset[str] = frozenset({"x", "qkv", "residual", "keep"})


class Draw:
    """Seeded tensors of one dtype, made on the device; `keep` stays fp32."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.mul_(std).add_(mean).to(self.dtype)

    def keep(self, batch: int) -> Tensor:
        """Drop-path factors at probability .1: 0 or 1 / .9."""
        kept = torch.rand(batch, generator=self.generator, device=self.device) >= 0.1
        return kept.float() / 0.9

    def linear(self, name: str, outputs: int, inputs: int) -> Tensors:
        prefix = f"{name}_" if name else ""
        weight = self.normal(outputs, inputs, std=inputs**-0.5)
        return {f"{prefix}weight": weight, f"{prefix}bias": self.normal(outputs, std=0.1)}

    def norm(self, name: str, width: int) -> Tensors:
        scale = self.normal(width, mean=1.0, std=0.3)
        return {f"{name}_weight": scale, f"{name}_bias": self.normal(width, std=0.2)}

    def activations(self, shape: Shape, channels: int) -> Tensor:
        return self.normal(shape.batch, shape.tokens, channels)


# LayerNorm alone -----------------------------------------------------------------------------------------------------


class LayerNormFunction(torch.autograd.Function):
    """The LayerNorm kernels that the fused ops share, made callable by themselves so that they can be timed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        out, mean, rstd = layernorm_fwd(rows, weight, bias, EPS, x.dtype)
        ctx.save_for_backward(rows, weight, mean, rstd)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, weight, mean, rstd = ctx.saved_tensors
        (dout,) = grads
        dx, dweight, dbias = layernorm_bwd(dout.reshape(rows.shape).contiguous(), rows, weight, mean, rstd)
        return dx.view(dout.shape), dweight, dbias


def _layernorm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    return LayerNormFunction.apply(x, ln_weight, ln_bias)


def _layernorm_reference(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, EPS)


# A whole block -------------------------------------------------------------------------------------------------------


def _block(x: Tensor, heads: int, keep: Tensor, **tensors: Tensor) -> Tensor:
    block = BlockTensors(**tensors, ls1=None, ls2=None)
    return fused_block_forward(x, block, heads, keep1_B=keep, keep2_B=keep)


def _block_reference(x: Tensor, heads: int, keep: Tensor, **t: Tensor) -> Tensor:
    qkv = layernorm_qkv_reference(x, t["norm1_weight"], t["norm1_bias"], t["qkv_weight"], t["qkv_bias"], EPS)
    out = attention_reference(qkv, heads)
    x = linear_residual_reference(out, t["proj_weight"], t["proj_bias"], x, None, keep)
    norm, fc1, fc2 = ((t[f"{name}_weight"], t[f"{name}_bias"]) for name in ("norm2", "fc1", "fc2"))
    return layernorm_mlp_reference(x, *norm, *fc1, *fc2, EPS, residual=True, keep=keep)


# The least work ------------------------------------------------------------------------------------------------------
# Tensors that stay inside an op need not touch memory, so they do not count. A backward reads what the forward was
# given, the gradient of the output and nothing else; it writes a gradient for each input.


def _work(shape: Shape, weights: float, attention: bool, inputs: float, outputs: float, dinputs: float) -> Work:
    """weights: elements of the matrices; inputs, outputs, dinputs: elements a row (M of them) read and written."""
    products = 2.0 * shape.rows * weights
    scores = 4.0 * shape.rows * shape.tokens * shape.width if attention else 0.0
    return Work(
        forward_flops=products + scores,
        forward_elements=shape.rows * (inputs + outputs) + weights,
        backward_flops=2 * products + 2.5 * scores,
        backward_elements=shape.rows * (inputs + outputs + dinputs) + 2 * weights,
    )


def _layernorm_work(s: Shape) -> Work:
    return _work(s, 0, False, s.width, s.width, s.width)


def _layernorm_qkv_work(s: Shape) -> Work:
    return _work(s, 3 * s.width**2, False, s.width, 3 * s.width, s.width)


def _attention_work(s: Shape) -> Work:
    return _work(s, 0, True, 3 * s.width, s.width, 3 * s.width)


def _linear_residual_work(s: Shape) -> Work:
    # The backward needs no residual, and its gradient is the output's: dout and x are read, dx is written.
    forward = _work(s, s.width**2, False, 2 * s.width, s.width, s.width)
    return Work(
        forward.forward_flops,
        forward.forward_elements,
        forward.backward_flops,
        3 * s.rows * s.width + 2 * s.width**2,
    )


def _mlp_work(s: Shape) -> Work:
    return _work(s, 8 * s.width**2, False, s.width, s.width, s.width)


def _block_work(s: Shape) -> Work:
    return _work(s, 12 * s.width**2, True, s.width, s.width, s.width)


# Inputs --------------------------------------------------------------------------------------------------------------


def _mlp_inputs(draw: Draw, s: Shape) -> Tensors:
    layers = draw.linear("fc1", 4 * s.width, s.width) | draw.linear("fc2", s.width, 4 * s.width)
    return {"x": draw.activations(s, s.width)} | layers


def _linear_residual_inputs(draw: Draw, s: Shape) -> Tensors:
    x, residual = (draw.activations(s, s.width) for _ in range(2))
    branch = {"gamma": draw.normal(s.width, mean=0.1, std=0.3), "keep": draw.keep(s.batch)}
    return {"x": x, "residual": residual} | draw.linear("", s.width, s.width) | branch


def _block_inputs(draw: Draw, s: Shape) -> Tensors:
    tensors = {"x": draw.activations(s, s.width), "keep": draw.keep(s.batch)}
    for name, outputs, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
        tensors |= draw.linear(name, outputs * s.width, inputs * s.width)
    return tensors | draw.norm("norm1", s.width) | draw.norm("norm2", s.width)


def _heads(shape: Shape) -> dict[str, Any]:
    return {"num_heads": shape.heads}


OPS = {
    op.name: op
    for op in (
        Op(
            "layernorm",
            _layernorm,
            _layernorm_reference,
            lambda draw, s: {"x": draw.activations(s, s.width)} | draw.norm("ln", s.width),
            _layernorm_work,
        ),
        Op(
            "layernorm_qkv",
            layernorm_qkv,
            layernorm_qkv_reference,
            lambda draw, s: (
                {"x": draw.activations(s, s.width)} | draw.norm("ln", s.width) | draw.linear("", 3 * s.width, s.width)
            ),
            _layernorm_qkv_work,
        ),
        Op(
            "attention",
            attention,
            attention_reference,
            lambda draw, s: {"qkv": draw.activations(s, 3 * s.width)},
            _attention_work,
            options=_heads,
        ),
        Op(
            "linear_residual",
            linear_residual,
            linear_residual_reference,
            _linear_residual_inputs,
            _linear_residual_work,
        ),
        Op("mlp_gelu", mlp_gelu, mlp_gelu_reference, _mlp_inputs, _mlp_work),
        Op(
            "layernorm_mlp",
            layernorm_mlp,
            layernorm_mlp_reference,
            lambda draw, s: (
                _mlp_inputs(draw, s)
                | draw.norm("ln", s.width)
                | {"gamma": draw.normal(s.width, mean=0.1, std=0.3), "keep": draw.keep(s.batch)}
            ),
            _mlp_work,
            options=lambda s: {"residual": True},
        ),
        Op("block", _block, _block_reference, _block_inputs, _block_work, options=lambda s: {"heads": s.heads}),
    )
}
