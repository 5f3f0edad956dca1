"""What `benchmarks.micro` times: the ops of `deitfast.kernels.catalogue`, LayerNorm alone and a whole block.

And the least work of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels import catalogue
from deitfast.kernels.attention_op import attention_reference
from deitfast.kernels.catalogue import Draw, Op, Shape, Tensors
from deitfast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp_reference
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv_reference
from deitfast.kernels.linear_residual_op import linear_residual_reference
from deitfast.model.fused import BlockTensors, fused_block_forward

EPS = 1e-6
Way = Callable[..., Tensor]

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


def _block_inputs(draw: Draw, s: Shape) -> Tensors:
    tensors = {"x": draw.activations(*s.leading, s.width), "path_scale": draw.path_scale(s.batch)}
    for name, outputs, inputs in (("qkv", 3, 1), ("proj", 1, 1), ("fc1", 4, 1), ("fc2", 1, 4)):
        tensors |= draw.linear(name, outputs * s.width, inputs * s.width)
    return tensors | draw.norm("norm1", s.width) | draw.norm("norm2", s.width)


def _block(x: Tensor, heads: int, path_scale: Tensor, **tensors: Tensor) -> Tensor:
    block = BlockTensors(**tensors, ls1=None, ls2=None)
    return fused_block_forward(x, block, heads, path_scale1_B=path_scale, path_scale2_B=path_scale)


def _block_reference(x: Tensor, heads: int, path_scale: Tensor, **t: Tensor) -> Tensor:
    qkv = layernorm_qkv_reference(x, t["norm1_weight"], t["norm1_bias"], t["qkv_weight"], t["qkv_bias"], EPS)
    out = attention_reference(qkv, heads)
    x = linear_residual_reference(out, t["proj_weight"], t["proj_bias"], x, None, path_scale)
    norm, fc1, fc2 = ((t[f"{name}_weight"], t[f"{name}_bias"]) for name in ("norm2", "fc1", "fc2"))
    return layernorm_mlp_reference(x, *norm, *fc1, *fc2, EPS, residual=True, path_scale=path_scale)


OPS = catalogue.OPS | {
    "layernorm": Op(
        "layernorm",
        _layernorm,
        _layernorm_reference,
        lambda draw, s: {"x": draw.activations(*s.leading, s.width), **draw.norm("ln", s.width)},
    ),
    "block": Op("block", _block, _block_reference, _block_inputs, options=lambda s: {"heads": s.heads}),
}


# The least work ------------------------------------------------------------------------------------------------------
# Tensors that stay inside an op need not touch memory, so they do not count. A backward reads what the forward was
# given, the gradient of the output and nothing else; it writes a gradient for each input.


@dataclass(frozen=True)
class Work:
    """The least a call must do: floating-point operations of its matrix products, elements it must read or write.

    forward_bytes: of what has an element size of its own.
    """

    forward_flops: float
    forward_elements: float
    backward_flops: float
    backward_elements: float
    forward_bytes: float = 0.0

    def total(self, backward: bool, itemsize: int) -> tuple[float, float]:
        """FLOPs and bytes of the forward, or of forward and backward."""
        flops = self.forward_flops + backward * self.backward_flops
        elements = self.forward_elements + backward * self.backward_elements
        return flops, itemsize * elements + self.forward_bytes


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


def _input_work(s: Shape) -> Work:
    values = 3.0 * s.batch * s.pixels**2
    return Work(0.0, values, 0.0, 0.0, forward_bytes=values)


def _patch_embed_work(s: Shape) -> Work:
    rows, inputs, weights = s.batch * s.patches, s.patch_values, s.patch_values * s.width
    flops, patches, out = 2.0 * rows * weights, rows * inputs, s.rows * s.width
    table = (s.tokens + s.prefix) * s.width
    return Work(flops, patches + out + weights + table, flops, patches + out + weights + table)


def _layernorm_attention_work(s: Shape) -> Work:
    return _work(s, 4 * s.width**2, True, s.width, s.width, s.width)


def _block_work(s: Shape) -> Work:
    return _work(s, 12 * s.width**2, True, s.width, s.width, s.width)


def _loss_work(s: Shape) -> Work:
    logits = s.batch * s.classes
    return Work(0.0, logits, 0.0, 2 * logits)


WORK: dict[str, Callable[[Shape], Work]] = {
    "input_patches": _input_work,
    "patch_embed": _patch_embed_work,
    "layernorm": _layernorm_work,
    "layernorm_qkv": _layernorm_qkv_work,
    "attention": _attention_work,
    "linear_residual": _linear_residual_work,
    "mlp_gelu": _mlp_work,
    "layernorm_attention": _layernorm_attention_work,
    "layernorm_mlp": _mlp_work,
    "block": _block_work,
    "mixed_cross_entropy": _loss_work,
    "mixed_bce": _loss_work,
}
"""Op -> the least work of a call."""
