"""The ops without gradients, with tensors to run them on as `catalogue` has the others: augmentation, the update.

    GRADIENT_FREE: image_ops, and adamw, lamb, sgd, which stand for the update by that optimiser

Their sizes are not those of a batch. Images: some of every operation, as large as the run's. Weights: those of two
blocks, of the embedding and of the head, so that in DeiT-B each program of an update has several blocks to update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from deitfast.kernels.catalogue import Draw, Op, Shape, Tensors
from deitfast.kernels.flat_buffers import FlatBuffers, Optimizer, Scalars, Segments
from deitfast.kernels.image_ops import CODES, image_ops, image_ops_reference
from deitfast.kernels.optimizer import update
from deitfast.kernels.optimizer_eager import update_reference

# Augmentation --------------------------------------------------------------------------------------------------------

_SLOTS, _IMAGES = 3, 2 * len(CODES)
_LATER = [code for name, code in CODES.items() if name not in ("skip", "blur")]


def _image_ops_inputs(draw: Draw, s: Shape) -> Tensors:
    """Every operation first in two images, of one to three operations each; of many levels and of few."""
    sample = torch.arange(_IMAGES, device=draw.device)
    first = torch.tensor(list(CODES.values()), device=draw.device)
    later = torch.tensor(_LATER, device=draw.device)
    code = torch.stack([first[sample % len(first)], later[sample * 5 % len(later)], later[sample * 3 % len(later)]])
    code[1] = torch.where((code[0] == CODES["skip"]) & (sample % 2 == 1), CODES["skip"], code[1])
    done = code != CODES["skip"]
    plan = torch.cat([torch.stack([code, done & (done.cumsum(0) == 1)], dim=2), _amounts(draw, s, code)], dim=2)
    shift = (sample % 4)[:, None, None, None]
    levels = draw.integers(256, _IMAGES, s.pixels, s.pixels, 3)
    return {"images": ((levels >> shift) + 24 * shift).to(torch.uint8), "plan": plan}


def _amounts(draw: Draw, s: Shape, code: Tensor) -> Tensor:
    """Random amounts of each operation's kind, float64 (slots, images, 6)."""
    share = draw.uniform(_SLOTS, _IMAGES, 6).double()
    row = partial(torch.tensor, dtype=torch.float64, device=draw.device)
    of = {
        "posterize": 256 - 2 ** (9 * share).floor(),
        "solarize": (257 * share).floor(),
        "solarize add": (111 * share).floor(),
        "affine": row([1, 0, 0, 0, 1, 0]) + row([0.6, 0.6, s.pixels / 2] * 2) * (share - 0.5),
        "blur": (row([1 << 23, 1 << 21, 1 << 21, 0, 0, 0]) * share).floor(),
    }
    amounts = 2 * share  # factors
    for name, amount in of.items():
        amounts = torch.where((code == CODES[name])[..., None], amount, amounts)
    return amounts


# The update ----------------------------------------------------------------------------------------------------------

_WRITTEN = ("master", "exp_avg", "exp_avg_sq", "ema")
_SCALARS = Scalars(
    lr=1e-3, step=3.0, step_size=1e-3 / (1 - 0.9**3), bias_correction1=1 - 0.9**3,
    bias_correction2_sqrt=math.sqrt(1 - 0.999**3), beta1=0.9, one_minus_beta1=0.1, beta2=0.999, one_minus_beta2=0.001,
    eps=1e-8, clip_norm=1.0, ema_weight=0.01,
)  # fmt: skip


def _parameters(s: Shape) -> list[tuple[int, ...]]:
    D = s.width
    block = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    return [(D, s.patch_values), (s.tokens, D), *block, *block, (s.classes, D), (s.classes,)]


def _segments(s: Shape, device: torch.device | str) -> Segments:
    shapes = _parameters(s)
    decays = [0.05 if len(shape) > 1 else 0.0 for shape in shapes]
    return Segments.of([math.prod(shape) for shape in shapes], decays, torch.device(device))


def _of_segments(s: Shape) -> Mapping[str, Any]:
    segments = _segments(s, "cpu")
    return {"padded": segments.padded, "decays": segments.decays}


def _update_inputs(optimizer: Optimizer, draw: Draw, s: Shape) -> Tensors:
    """Weights, moments and average in the middle of a training; the gradient has the draw's dtype, they are fp32."""
    segments = _segments(s, draw.device)
    size = sum(segments.padded)
    tensors = {
        "grad": draw.normal(size, std=2 / math.sqrt(size)),
        "scalars": torch.tensor(astuple(_SCALARS), device=draw.device),
        "master": (draw.uniform(size) - 0.5) / 10,
        "exp_avg": (draw.uniform(size) - 0.5) / 500,
        "exp_avg_sq": draw.uniform(size) / 1e6,
        "ema": (draw.uniform(size) - 0.5) / 10,
        "block_decay": segments.block_decay,
        "block_segment": segments.block_segment,
        "first_block": segments.first_block,
        "segment_decay": segments.segment_decay,
    }
    return {name: x for name, x in tensors.items() if name != "exp_avg_sq" or optimizer != "sgd"}


def _updates(apply: Callable[..., None], optimizer: Optimizer) -> Callable[..., Tensors]:
    """A function of an update's buffers, which it leaves as they are, that gives them as three updates leave them.

    By the gradient, by the same in fp32, as processes sum it, and by one that is infinite in an element.
    """

    def updated(
        grad: Tensor, scalars: Tensor, block_decay: Tensor, block_segment: Tensor, first_block: Tensor,
        segment_decay: Tensor, padded: tuple[int, ...], decays: tuple[float, ...], **tensors: Tensor,
    ) -> Tensors:  # fmt: skip
        own: dict[str, Any] = {name: _copy(tensors[name]) if name in tensors else None for name in _WRITTEN}
        like: dict[str, Any] = {"dtype": own["master"].dtype, "device": grad.device}
        buffers = FlatBuffers(
            segments=Segments(
                padded, decays, block_decay, block_segment, len(block_decay), first_block, segment_decay
            ),
            grad=grad, **own, compute=torch.empty_like(grad) if grad.dtype != torch.float32 else None,
            norm=torch.empty((), **like), skipped=torch.zeros((), dtype=torch.int64, device=grad.device),
            steps=torch.zeros((), **like),
        )  # fmt: skip
        infinite = grad.clone()
        infinite[-1:].fill_(math.inf)
        norms = []
        for given in (grad, grad.to(own["master"].dtype), infinite):
            buffers.grad = _copy(given)
            apply(optimizer, buffers, scalars)
            norms.append(buffers.norm.clone())
        found = {**own, "compute": buffers.compute, "norm": torch.stack(norms[:2])}
        found |= {"skipped": buffers.skipped, "steps": buffers.steps}
        return {name: x for name, x in found.items() if x is not None}

    return updated


def _copy(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x)


def _update_of(optimizer: Optimizer) -> Op:
    names = (*_WRITTEN, "grad", "scalars", "block_decay", "block_segment", "first_block", "segment_decay")
    return Op(
        optimizer, _updates(update, optimizer), _updates(update_reference, optimizer),
        partial(_update_inputs, optimizer), options=_of_segments, per_sample=frozenset(), constants=frozenset(names),
    )  # fmt: skip


GRADIENT_FREE = {
    "image_ops": Op(
        "image_ops",
        image_ops,
        image_ops_reference,
        _image_ops_inputs,
        options=lambda s: {"fill": (124, 116, 104), "blurs": True},
        out=lambda s: (_IMAGES, s.pixels, s.pixels, 3),
        per_sample=frozenset(),
        constants=frozenset({"images", "plan"}),
        exact=True,
    ),
    **{optimizer: _update_of(optimizer) for optimizer in get_args(Optimizer)},
}
