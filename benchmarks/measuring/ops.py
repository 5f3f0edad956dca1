"""The ops that the micro benchmarks time: how each is called, its eager reference, its inputs, and its least work.

Inputs are distributed as in a trained DeiT: activations of about unit size, weights of std .02 or 1/sqrt(width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.data import IMAGENET_MEAN, IMAGENET_STD, draws
from deitfast.kernels.attention import attention, attention_reference
from deitfast.kernels.input import input_patches, input_patches_reference
from deitfast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from deitfast.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_reference
from deitfast.kernels.layernorm_qkv import layernorm_qkv, layernorm_qkv_reference
from deitfast.kernels.linear_residual import linear_residual, linear_residual_reference
from deitfast.kernels.mlp_gelu import mlp_gelu, mlp_gelu_reference
from deitfast.kernels.patch_embed import patch_embed, patch_embed_reference
from deitfast.model.fused import BlockTensors, fused_block_forward

MODELS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
"""DeiT's sizes: width and heads."""
PATCH = 16
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

    @property
    def prefix(self) -> int:
        """Tokens that are no patch of a square image: 1, or 2 with a distillation token."""
        return 1 if math.isqrt(self.tokens - 1) ** 2 == self.tokens - 1 else 2

    @property
    def patches(self) -> int:
        return self.tokens - self.prefix

    @property
    def pixels(self) -> int:
        """Side of the image."""
        return PATCH * math.isqrt(self.patches)

    def key(self) -> dict[str, Any]:
        return {"model": self.model, "tokens": self.tokens, "batch": self.batch}

    def __str__(self) -> str:
        return f"{self.model} {self.batch} x {self.tokens}"


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


def _no_options(shape: Shape) -> dict[str, Any]:
    return {}


def _stream(shape: Shape) -> tuple[int, ...]:
    return shape.batch, shape.tokens, shape.width


@dataclass(frozen=True)
class Op:
    """One op. fused, reference: the same keyword arguments, named as in `inputs`, plus `options(shape)`.

    out: shape of the result. per_sample: inputs whose first dimension is the batch. constants: inputs without a
    gradient; an op of nothing else has no backward.
    """

    name: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[[Draw, Shape], Tensors]
    work: Callable[[Shape], Work]
    options: Callable[[Shape], Mapping[str, Any]] = field(default=_no_options)
    out: Callable[[Shape], tuple[int, ...]] = field(default=_stream)
    per_sample: frozenset[str] = frozenset({"x", "qkv", "residual", "keep"})
    constants: frozenset[str] = frozenset({"keep"})


class Draw:
    """Seeded tensors of one dtype, made on the device; `keep` stays fp32."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return values.mul_(std).add_(mean).to(self.dtype)

    def bytes(self, *shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=self.generator, device=self.device)

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


# The batch as patches ------------------------------------------------------------------------------------------------

EPOCH, SEED = 2, 0


def _input_inputs(draw: Draw, s: Shape) -> Tensors:
    """A batch with the paper's rectangles and mixtures; `like` carries the dtype, `erased` stays on the host."""
    index, view = np.arange(s.batch), np.zeros(s.batch, np.int64)
    erase = draws.random_erasing(s.pixels, index, EPOCH, view, SEED)
    lam, box = (np.repeat(x, 2, axis=0)[: s.batch] for x in draws.mix(s.pixels, -(-s.batch // 2), 0, SEED))
    arrays = {"erase": erase, "mix_box": box, "lam": lam, "index": index, "view": view, "epoch": np.array([EPOCH])}
    tensors = {name: torch.from_numpy(array).to(draw.device) for name, array in arrays.items()}
    erased = torch.tensor(int((erase[:, 2] * erase[:, 3]).sum()))
    return {"images": draw.bytes(s.batch, s.pixels, s.pixels, 3), "like": draw.normal(0), "erased": erased} | tensors


def _input(like: Tensor, erased: Tensor, **arguments: Any) -> Tensor:
    return input_patches(dtype=like.dtype, **arguments)


def _input_reference(like: Tensor, erased: Tensor, **arguments: Any) -> Tensor:
    return input_patches_reference(dtype=like.dtype, **arguments)


def _input_options(s: Shape) -> dict[str, Any]:
    moments = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return moments | {"seed": SEED, "patch_size": PATCH, "mixes": s.batch % 2 == 0}


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


def _input_work(s: Shape) -> Work:
    values = 3.0 * s.batch * s.pixels**2
    return Work(0.0, values, 0.0, 0.0, forward_bytes=values)


def _patch_embed_work(s: Shape) -> Work:
    rows, inputs, weights = s.batch * s.patches, 3 * PATCH**2, 3 * PATCH**2 * s.width
    flops, patches, out = 2.0 * rows * weights, rows * inputs, s.rows * s.width
    table = (s.tokens + s.prefix) * s.width
    return Work(flops, patches + out + weights + table, flops, patches + out + weights + table)


def _block_work(s: Shape) -> Work:
    return _work(s, 12 * s.width**2, True, s.width, s.width, s.width)


# Inputs --------------------------------------------------------------------------------------------------------------


def _mlp_inputs(draw: Draw, s: Shape) -> Tensors:
    layers = draw.linear("fc1", 4 * s.width, s.width) | draw.linear("fc2", s.width, 4 * s.width)
    return {"x": draw.activations(s, s.width)} | layers


def _patch_embed_inputs(draw: Draw, s: Shape) -> Tensors:
    tables = {"prefix_tokens": draw.normal(s.prefix, s.width, std=0.5), "pos_embed": draw.normal(s.tokens, s.width)}
    patches = draw.normal(s.batch, s.patches, 3 * PATCH**2)
    return {"patches": patches} | draw.linear("", s.width, 3 * PATCH**2) | tables


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
            "input_patches",
            _input,
            _input_reference,
            _input_inputs,
            _input_work,
            options=_input_options,
            out=lambda s: (s.batch, s.patches, 3 * PATCH**2),
            per_sample=frozenset({"images", "erase", "mix_box", "lam", "index", "view"}),
            constants=frozenset({"images", "erase", "mix_box", "lam", "index", "view", "epoch", "like", "erased"}),
        ),
        Op(
            "patch_embed",
            patch_embed,
            patch_embed_reference,
            _patch_embed_inputs,
            _patch_embed_work,
            per_sample=frozenset({"patches"}),
            constants=frozenset({"patches"}),
        ),
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
            out=lambda s: (s.batch, s.tokens, 3 * s.width),
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
