"""Every differentiable op with tensors to run it on: for whoever tests, verifies, times or tunes them.

    op, shape = OPS["mlp_gelu"], Shape.of("B", tokens=197, batch=64)
    tensors = op.inputs(Draw(seed, torch.bfloat16, "cuda"), shape)
    op.function(**tensors, **op.options(shape))                # what is judged
    op.reference(**tensors, **op.options(shape))               # the same in eager PyTorch, in any dtype

Tensors are distributed as in a trained ViT: rows of activations have a mean of about a third of their spread, weights
keep the size of what passes, biases and LayerScale are small. What decides whether a result is right, the definitions
in float64 and the tolerances, lives with those who judge. The augmentations and the optimiser's update have no
gradients; they are in `gradient_free`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deitfast.kernels.attention_op import attention, attention_reference
from deitfast.kernels.input import input_patches, input_patches_reference
from deitfast.kernels.layernorm_attention_op import layernorm_attention, layernorm_attention_reference
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp, layernorm_mlp_reference
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv, layernorm_qkv_reference
from deitfast.kernels.linear_residual_op import linear_residual, linear_residual_reference
from deitfast.kernels.loss import (
    mixed_bce,
    mixed_bce_reference,
    mixed_cross_entropy,
    mixed_cross_entropy_reference,
    of_fp32_logits,
)
from deitfast.kernels.mlp_gelu_op import mlp_gelu, mlp_gelu_reference
from deitfast.kernels.patch_embed_op import patch_embed, patch_embed_reference

MODELS = {"Ti": (192, 3), "S": (384, 6), "B": (768, 12)}
"""DeiT's sizes: width and heads."""
EPOCH = 2
"""Of the erasing noise."""
Tensors = dict[str, Tensor]
Inputs = dict[str, Tensor | None]
"""Of an op that may be given less: its optional tensors may be None."""


@dataclass(frozen=True)
class Shape:
    """One size of an op: what of the model and of the batch it depends on. model: a name for it, in tables."""

    width: int
    heads: int
    tokens: int
    batch: int
    prefix: int = 1
    patch_size: int = 16
    classes: int = 1000
    model: str = ""

    @classmethod
    def of(cls, model: str, tokens: int, batch: int) -> Shape:
        """A DeiT of `MODELS`, with a distillation token where the others make no square."""
        width, heads = MODELS[model]
        return cls(width, heads, tokens, batch, prefix=2 - (math.isqrt(tokens - 1) ** 2 == tokens - 1), model=model)

    @property
    def leading(self) -> tuple[int, int]:
        return self.batch, self.tokens

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def patches(self) -> int:
        return self.tokens - self.prefix

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def pixels(self) -> int:
        """Side of the image."""
        return self.patch_size * math.isqrt(self.patches)

    def key(self) -> dict[str, Any]:
        return {"model": self.model, "tokens": self.tokens, "batch": self.batch}

    def __str__(self) -> str:
        return f"{self.model or self.width} {self.batch} x {self.tokens}"


class Draw:
    """Seeded tensors of one dtype, made on their device; drop-path's factors and lambdas are fp32 in every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return self._randn(*shape).mul_(std).add_(mean).to(self.dtype)

    def activations(self, *shape: int, ratio: float = 0.3, outliers: int = 0) -> Tensor:
        """Rows with |mean| / std = `ratio` and `outliers` channels that lie 50 standard deviations off."""
        x = self._randn(*shape)
        x[..., torch.randperm(shape[-1], generator=self.generator, device=self.device)[:outliers]] += 50
        x -= x.mean(-1, keepdim=True)
        return x.add_(ratio * x.square().mean(-1, keepdim=True).sqrt()).to(self.dtype)

    def linear(self, name: str, outputs: int, inputs: int, bias: float = 0.1) -> Tensors:
        """`name`_weight (outputs, inputs) and `name`_bias, of std `bias`; no prefix for an empty name."""
        prefix = f"{name}_" if name else ""
        weight = self.normal(outputs, inputs, std=inputs**-0.5)
        return {f"{prefix}weight": weight, f"{prefix}bias": self.normal(outputs, std=bias)}

    def norm(self, name: str, width: int) -> Tensors:
        scale = self.normal(width, mean=1.0, std=0.3)
        return {f"{name}_weight": scale, f"{name}_bias": self.normal(width, std=0.2)}

    def gamma(self, width: int) -> Tensor:
        """LayerScale's factors."""
        return self.normal(width, mean=0.1, std=0.3)

    def path_scale(self, batch: int) -> Tensor:
        """Drop-path factors: every third sample dropped."""
        return torch.tensor([0.0 if i % 3 == 1 else 1.25 for i in range(batch)], device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """fp32, [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, most: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """0 to most - 1."""
        return torch.randint(most, shape, generator=self.generator, device=self.device, dtype=dtype)

    def boxes(self, side: int, count: int) -> Tensor:
        """int64 (count, 4): rectangles (top, left, height, width) inside an image, up to half of it each way."""
        size = 1 + (self.uniform(count, 2) * (side // 2)).long()
        return torch.cat([(self.uniform(count, 2) * (side - size + 1)).long(), size], dim=1)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


# Inputs of the linear ops, for rows of any number and width ----------------------------------------------------------


def layernorm_qkv_inputs(draw: Draw, leading: tuple[int, ...], D: int, N: int, **activations: Any) -> Inputs:
    return {"x": draw.activations(*leading, D, **activations), **draw.norm("ln", D), **draw.linear("", N, D)}


def mlp_gelu_inputs(draw: Draw, leading: tuple[int, ...], D: int, H: int, **activations: Any) -> Inputs:
    x = draw.activations(*leading, D, **activations)
    return {"x": x, **draw.linear("fc1", H, D, bias=0.3), **draw.linear("fc2", D, H)}


def linear_residual_inputs(draw: Draw, leading: tuple[int, ...], D: int, K: int, **activations: Any) -> Inputs:
    tensors = {"x": draw.activations(*leading, K, **activations), **draw.linear("", D, K)}
    residual = draw.activations(*leading, D, **activations)
    return {
        **tensors,
        "residual": residual,
        "gamma": draw.gamma(D),
        "path_scale": draw.path_scale(leading[0]) if leading else None,
    }


def layernorm_mlp_inputs(draw: Draw, leading: tuple[int, ...], D: int, H: int, **activations: Any) -> Inputs:
    path_scale = draw.path_scale(leading[0]) if leading else None
    branch: Inputs = {**draw.norm("ln", D), "gamma": draw.gamma(D), "path_scale": path_scale}
    return mlp_gelu_inputs(draw, leading, D, H, **activations) | branch


def layernorm_attention_inputs(draw: Draw, leading: tuple[int, ...], D: int, _: int = 0, **activations: Any) -> Inputs:
    """path_scale only where there is a batch of samples: (samples, tokens)."""
    tensors = {"x": draw.activations(*leading, D, **activations), **draw.norm("ln", D)}
    tensors |= draw.linear("qkv", 3 * D, D) | draw.linear("proj", D, D)
    return {**tensors, "gamma": draw.gamma(D), "path_scale": draw.path_scale(leading[0]) if len(leading) > 1 else None}


def _all_there(inputs: Inputs) -> Tensors:
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


# Inputs of the way in and of the losses ------------------------------------------------------------------------------


def _input_patches_inputs(draw: Draw, s: Shape) -> Tensors:
    """Every fourth sample erased; pairs mixed by lambda and by rectangle in turn. `like` carries the dtype."""
    m, sample = s.batch, torch.arange(s.batch, device=draw.device)
    pair = sample // 2
    mix_box = draw.boxes(s.pixels, -(-m // 2))[pair] * (pair % 2 == 1)[:, None]
    return {
        "images": draw.integers(256, m, s.pixels, s.pixels, 3, dtype=torch.uint8),
        "like": draw.normal(0),
        "erase": draw.boxes(s.pixels, m) * (sample % 4 == 1)[:, None],
        "mix_box": mix_box,
        "lam": draw.uniform(-(-m // 2))[pair],
        "index": sample,
        "view": torch.zeros_like(sample),
        "epoch": torch.tensor([EPOCH], device=draw.device),
    }


def _input_patches(like: Tensor, **arguments: Any) -> Tensor:
    return input_patches(dtype=like.dtype, **arguments)


def _input_patches_reference(like: Tensor, **arguments: Any) -> Tensor:
    return input_patches_reference(dtype=like.dtype, **arguments)


def _patch_embed_inputs(draw: Draw, s: Shape) -> Tensors:
    tables = {"prefix_tokens": draw.normal(s.prefix, s.width, std=0.5), "pos_embed": draw.normal(s.tokens, s.width)}
    return {
        "patches": draw.normal(s.batch, s.patches, s.patch_values),
        **draw.linear("", s.width, s.patch_values),
    } | tables


def _loss_inputs(draw: Draw, s: Shape) -> Tensors:
    labels, partner_labels = (draw.integers(s.classes, s.batch) for _ in range(2))
    logits = draw.normal(s.batch, s.classes, std=3.0)
    return {"logits": logits, "labels": labels, "partner_labels": partner_labels, "lam": draw.uniform(s.batch)}


# The ops -------------------------------------------------------------------------------------------------------------


def _no_options(shape: Shape) -> Mapping[str, Any]:
    return {}


def _stream(shape: Shape) -> tuple[int, ...]:
    return shape.batch, shape.tokens, shape.width


def _heads(shape: Shape) -> Mapping[str, Any]:
    return {"num_heads": shape.heads}


@dataclass(frozen=True)
class Op:
    """One op. function, reference: the same keyword arguments, named as in `inputs`, plus `options(shape)`.

    They give a tensor, or several by name where there is no backward.

    out: shape of the result. per_sample: inputs whose first dimension is the batch; none where the samples do not
    stand for themselves. constants: inputs without a gradient; an op of nothing else has no backward. exact: integers,
    which must be those of the reference on the host; that one may wait for the device, so no CUDA graph has it.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Draw, Shape], Tensors]
    options: Callable[[Shape], Mapping[str, Any]] = field(default=_no_options)
    out: Callable[[Shape], tuple[int, ...]] = field(default=_stream)
    per_sample: frozenset[str] = frozenset({"x", "qkv", "residual", "path_scale"})
    constants: frozenset[str] = frozenset({"path_scale"})
    exact: bool = False


_LOSS: dict[str, Any] = {
    "inputs": _loss_inputs,
    "out": lambda s: (),
    "per_sample": frozenset(),
    "constants": frozenset({"labels", "partner_labels", "lam"}),
}
OPS = {
    op.name: op
    for op in (
        Op(
            "input_patches",
            _input_patches,
            _input_patches_reference,
            _input_patches_inputs,
            options=lambda s: {
                "seed": 2**40 + 17,
                "patch_size": s.patch_size,
                "mean": (0.5, 0.45, 0.4),
                "std": (0.25, 0.22, 0.23),
                "mixes": s.batch % 2 == 0,
            },
            out=lambda s: (s.batch, s.patches, s.patch_values),
            per_sample=frozenset({"images", "erase", "mix_box", "lam", "index", "view"}),
            constants=frozenset({"images", "like", "erase", "mix_box", "lam", "index", "view", "epoch"}),
        ),
        Op(
            "patch_embed",
            patch_embed,
            patch_embed_reference,
            _patch_embed_inputs,
            per_sample=frozenset({"patches"}),
            constants=frozenset({"patches"}),
        ),
        Op(
            "layernorm_qkv",
            layernorm_qkv,
            layernorm_qkv_reference,
            lambda draw, s: _all_there(layernorm_qkv_inputs(draw, s.leading, s.width, 3 * s.width)),
            out=lambda s: (s.batch, s.tokens, 3 * s.width),
        ),
        Op(
            "attention",
            attention,
            attention_reference,
            lambda draw, s: {"qkv": draw.activations(*s.leading, 3 * s.width)},
            options=_heads,
        ),
        Op(
            "linear_residual",
            linear_residual,
            linear_residual_reference,
            lambda draw, s: _all_there(linear_residual_inputs(draw, s.leading, s.width, s.width)),
        ),
        Op(
            "mlp_gelu",
            mlp_gelu,
            mlp_gelu_reference,
            lambda draw, s: _all_there(mlp_gelu_inputs(draw, s.leading, s.width, 4 * s.width)),
        ),
        Op(
            "layernorm_attention",
            layernorm_attention,
            layernorm_attention_reference,
            lambda draw, s: _all_there(layernorm_attention_inputs(draw, s.leading, s.width)),
            options=_heads,
        ),
        Op(
            "layernorm_mlp",
            layernorm_mlp,
            layernorm_mlp_reference,
            lambda draw, s: _all_there(layernorm_mlp_inputs(draw, s.leading, s.width, 4 * s.width)),
            options=lambda s: {"residual": True},
        ),
        Op(
            "mixed_cross_entropy",
            mixed_cross_entropy,
            of_fp32_logits(mixed_cross_entropy_reference),
            options=lambda s: {"smoothing": 0.1},
            **_LOSS,
        ),
        Op("mixed_bce", mixed_bce, of_fp32_logits(mixed_bce_reference), **_LOSS),
    )
}
