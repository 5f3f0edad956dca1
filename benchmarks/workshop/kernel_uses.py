"""Uses of the public ops that between them launch every kernel at every launch-table entry, for the compile report.

Forward and backward, at sizes that DeiTs have; the tensors are made where tensors have no data, and never filled. A
batch of 16 makes every size a multiple of 16, as in training; one of 3 does not, as at the end of an evaluation. One of
512 has rows enough for LayerNorm and a linear layer in one kernel.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from deitfast.kernels.attention_op import attention
from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Segments
from deitfast.kernels.image_ops import image_ops
from deitfast.kernels.input import input_patches
from deitfast.kernels.layernorm_attention_op import layernorm_attention
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv
from deitfast.kernels.loss import mixed_bce, mixed_cross_entropy
from deitfast.kernels.optimizer import update
from deitfast.kernels.patch_embed_op import patch_embed

BF16, FP32 = torch.bfloat16, torch.float32


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def _backward(out: Tensor) -> None:
    if out.requires_grad:
        out.backward(torch.empty_like(out))


def _norm(width: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"ln_weight": _leaf(width, dtype=dtype), "ln_bias": _leaf(width, dtype=dtype)}


def _linear(name: str, outputs: int, inputs: int, dtype: torch.dtype) -> dict[str, Any]:
    return {f"{name}weight": _leaf(outputs, inputs, dtype=dtype), f"{name}bias": _leaf(outputs, dtype=dtype)}


def _branch_end(form: str, gamma: bool, width: int, batch: int, stream: torch.dtype) -> dict[str, Any]:
    """LayerScale and drop-path. form: "whole" (none), "scaled" (a factor a sample) or "subset" (some samples run)."""
    found: dict[str, Any] = {"gamma": _leaf(width, dtype=stream) if gamma else None}
    if form == "scaled":
        found["path_scale"] = torch.empty(batch)
    if form == "subset":
        found |= {"subset": torch.empty(batch - 1, dtype=torch.int64), "subset_scale": 1.25}
    return found


def _attention_half(
    width: int, heads: int, form: str, gamma: bool, batch: int = 16, tokens: int = 197,
    dtype: torch.dtype = BF16, stream: torch.dtype = BF16,
) -> None:  # fmt: skip
    layers = _linear("qkv_", 3 * width, width, dtype) | _linear("proj_", width, width, dtype)
    rest = _norm(width, stream) | _branch_end(form, gamma, width, batch, stream)
    x = _leaf(batch, tokens, width, dtype=stream)
    _backward(layernorm_attention(x, **layers, **rest, num_heads=heads))


def _mlp_half(
    width: int, hidden: int, form: str, gamma: bool, batch: int = 16, tokens: int = 197,
    dtype: torch.dtype = BF16, stream: torch.dtype = BF16,
) -> None:  # fmt: skip
    layers = _linear("fc1_", hidden, width, dtype) | _linear("fc2_", width, hidden, dtype)
    rest = _norm(width, stream) | _branch_end(form, gamma, width, batch, stream)
    x = _leaf(batch, tokens, width, dtype=stream)
    _backward(layernorm_mlp(x, **layers, **rest, residual=True))


def _block(width: int, heads: int, form: str, gamma: bool, **options: Any) -> None:
    _attention_half(width, heads, form, gamma, **options)
    _mlp_half(width, 4 * width, form, gamma, **options)


def _layernorm_qkv(width: int) -> None:
    x = _leaf(512, 197, width, dtype=BF16)
    _backward(layernorm_qkv(x, **_norm(width, BF16), **_linear("", 3 * width, width, BF16)))


def _attention(head_dim: int, tokens: int, dtype: torch.dtype) -> None:
    """By itself, with two heads; and before a projection whose bias wants the sums of dq."""
    _backward(attention(_leaf(16, tokens, 6 * head_dim, dtype=dtype), 2))
    _attention_half(2 * head_dim, 2, "whole", gamma=False, tokens=tokens, dtype=dtype, stream=dtype)


def _patch_embed(width: int, patch: int, prefix: int, dtype: torch.dtype, stream: torch.dtype) -> None:
    patches = torch.empty(16, 196, 3 * patch * patch, dtype=dtype)
    weight, bias = _leaf(width, patches.shape[-1], dtype=dtype), _leaf(width, dtype=dtype)
    prefix_tokens, pos_embed = _leaf(prefix, width, dtype=stream), _leaf(prefix + 196, width, dtype=stream)
    _backward(patch_embed(patches, weight, bias, prefix_tokens, pos_embed))


def _input(patch: int, mixes: bool, dtype: torch.dtype) -> None:
    images, boxes = torch.empty(16, 224, 224, 3, dtype=torch.uint8), torch.empty(16, 4, dtype=torch.int64)
    index, epoch = torch.empty(16, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
    options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "dtype": dtype, "mixes": mixes}
    input_patches(images, boxes, boxes, torch.empty(16), index, index, epoch, seed=1, patch_size=patch, **options)


def _image_ops() -> None:
    plan = torch.empty(2, 16, 8, dtype=torch.float64)
    image_ops(torch.empty(16, 224, 224, 3, dtype=torch.uint8), plan, (124, 116, 104), blurs=True)


def _losses(classes: int, dtype: torch.dtype) -> None:
    logits, labels, lam = _leaf(16, classes, dtype=dtype), torch.empty(16, dtype=torch.int64), torch.empty(16)
    _backward(mixed_cross_entropy(logits, labels, labels, lam, 0.1))
    _backward(mixed_bce(logits, labels, labels, lam))


def _update(optimizer: Optimizer, copies: bool) -> None:
    """copies: a bf16 compute copy with bf16 gradients, and an average."""
    blocks, flat = 8449, 8449 * BLOCK
    segments = Segments(
        padded=(flat,), decays=(0.05,), block_decay=torch.empty(blocks),
        block_segment=torch.empty(blocks, dtype=torch.int32), first_block=torch.empty(2, dtype=torch.int32),
    )  # fmt: skip
    buffers = FlatBuffers(
        segments,
        grad=torch.empty(flat, dtype=BF16 if copies else FP32),
        master=torch.empty(flat),
        exp_avg=torch.empty(flat),
        exp_avg_sq=None if optimizer == "sgd" else torch.empty(flat),
        ema=torch.empty(flat) if copies else None,
        compute=torch.empty(flat, dtype=BF16) if copies else None,
        norm=torch.empty(()),
        skipped=torch.empty((), dtype=torch.int64),
        steps=torch.empty(()),
    )
    update(optimizer, buffers, torch.empty(12))


def _linear_ops() -> None:
    for width in (192, 384, 768):
        heads = width // 64
        for gamma in (False, True):
            _block(width, heads, "scaled", gamma)
            _block(width, heads, "subset", gamma)
        for form in ("scaled", "subset"):
            _block(width, heads, form, gamma=True, stream=FP32)
            _mlp_half(width, 4 * width, form, gamma=True, dtype=FP32, stream=FP32)
        _block(width, heads, "whole", gamma=False)
        _block(width, heads, "scaled", gamma=False, batch=512)
        _block(width, heads, "scaled", gamma=True, batch=3)
        with torch.no_grad():
            _block(width, heads, "whole", gamma=False, batch=3)
        _layernorm_qkv(width)
    for stream in (BF16, FP32):
        _block(768, 12, "subset", gamma=True, batch=512, stream=stream)
    _block(1280, 16, "subset", gamma=True, tokens=257)  # DeiT III's largest
    for form in ("whole", "scaled", "subset"):
        _mlp_half(197, 391, form, gamma=form != "whole")  # rows that are not aligned


def uses() -> None:
    """All of them."""
    _linear_ops()
    for head_dim, tokens in ((64, 192), (64, 256), (64, 577), (32, 197), (32, 577), (96, 257), (128, 257)):
        _attention(head_dim, tokens, BF16)
    for head_dim, tokens in ((32, 197), (64, 197), (80, 257)):  # tokens choose no kernel in fp32
        _attention(head_dim, tokens, FP32)
    for width, prefix, stream in ((192, 1, BF16), (192, 2, BF16), (768, 1, BF16), (768, 2, FP32)):
        _patch_embed(width, 16, prefix, BF16, stream)
    _patch_embed(1280, 14, 1, BF16, BF16)  # rows that are not aligned
    _patch_embed(384, 16, 2, FP32, FP32)
    for patch, mixes, dtype in ((16, True, BF16), (16, False, BF16), (4, True, BF16), (16, True, FP32)):
        _input(patch, mixes, dtype)
    _image_ops()
    for classes, dtype in ((1000, BF16), (21841, BF16), (1000, FP32)):
        _losses(classes, dtype)
    for optimizer in get_args(Optimizer):
        _update(optimizer, copies=True)
    _update("adamw", copies=False)
