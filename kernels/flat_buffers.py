"""What an update of all weights works on: flat buffers, where each tensor lies in them, and the update's scalars.

A flat buffer holds every tensor of a model one after the other. Each tensor, a segment, starts at a multiple of BLOCK
elements and is padded with zeros, so that each block of BLOCK elements belongs to one tensor: a table gives a block's
weight decay, another its segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

Optimizer = Literal["adamw", "lamb", "sgd"]

BLOCK = 1024
"""Elements to whose multiples segments are aligned, and that a program updates at once: 8 a thread."""
PARTS = 528
"""Partial sums of the squared norm: four programs for each of an H100's 132 multiprocessors; fixed, for the bits."""


@dataclass(frozen=True)
class Segments:
    """Where each of S tensors lies in the flat buffers, and how it is decayed.

    padded: elements of each segment, a multiple of BLOCK. decays: weight decay of each.
    block_decay (blocks,) fp32, block_segment (blocks,) int32, first_block (S + 1,) int32: the same, for the device.
    """

    padded: tuple[int, ...]
    decays: tuple[float, ...]
    block_decay: Tensor
    block_segment: Tensor
    first_block: Tensor

    @classmethod
    def of(cls, sizes: list[int], decays: list[float], device: torch.device) -> Segments:
        """The layout of tensors of `sizes` elements, in order."""
        blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
        segment = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
        first = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)])
        return cls(
            padded=tuple((blocks * BLOCK).tolist()),
            decays=tuple(decays),
            block_decay=torch.tensor(decays, dtype=torch.float32)[segment].to(device),
            block_segment=segment.to(device, torch.int32),
            first_block=first.to(device, torch.int32),
        )


@dataclass
class FlatBuffers:
    """What an update reads and writes; the vectors have one length, that of all segments together.

    grad (n,) fp32, bf16 or fp16; master, exp_avg (n,) fp32, exp_avg_sq (n,) fp32 or None (SGD, whose momentum is
    exp_avg), ema (n,) fp32 or None, compute (n,) any float dtype or None where the master weights are computed with.
    norm () fp32: last gradient norm. skipped () int64: updates that did not happen. steps () fp32: last one that did.
    """

    segments: Segments
    grad: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    ema: Tensor | None
    compute: Tensor | None
    norm: Tensor
    skipped: Tensor
    steps: Tensor

    def __post_init__(self) -> None:
        device, blocks = self.master.device, self.master.numel() // BLOCK
        self.norm_partials = torch.zeros(PARTS, dtype=torch.float32, device=device)
        self.lamb_partials = torch.zeros((2, blocks), dtype=torch.float32, device=device)
        self.ratios = torch.ones(len(self.segments.padded), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Scalars:
    """What an update depends on besides the buffers, in the order in which the kernels read it from one fp32 vector.

    step: the update's number, from 1. bias_correction1: 1 - beta1^step. bias_correction2_sqrt: sqrt(1 - beta2^step).
    step_size: lr / bias_correction1. clip_norm: 0 for none. SGD's momentum is beta1.
    """

    lr: float
    step: float
    step_size: float
    bias_correction1: float
    bias_correction2_sqrt: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    clip_norm: float
    ema_weight: float
