"""What an update of all weights works on: flat buffers, where each tensor lies in them, and the update's scalars.

A flat buffer holds every tensor of a model one after the other. Each tensor, a segment, starts at a multiple of BLOCK
elements and is padded with zeros, so that each block of BLOCK elements belongs to one tensor: a table gives a block's
weight decay, another its segment.

Several processes may each update some of the blocks. All they need of one another is the sum of squares of each block:
added up block by block, norms have the same bits however the blocks are spread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

Optimizer = Literal["adamw", "lamb", "sgd"]

BLOCK = 1024
"""Elements to whose multiples segments are aligned, and that a program updates at once: 8 a thread."""
PARTS = 528
"""Most partial sums of a squared norm: four programs for each of an H100's 132 multiprocessors; fixed, for the bits."""


@dataclass(frozen=True)
class Segments:
    """Where each of S tensors lies in the flat buffers, and how it is decayed.

    Of the blocks in this process's buffers: padded, decays: elements, a multiple of BLOCK, and weight decay of each run
    of one segment. block_decay (own blocks,) fp32, block_segment (own blocks,) int32; a block of no segment, which
    holds zeros alone, has the segment S.
    Of all: blocks: how many the segments have. first_block (S + 1,) int32, segment_decay (S,) fp32.
    """

    padded: tuple[int, ...]
    decays: tuple[float, ...]
    block_decay: Tensor
    block_segment: Tensor
    blocks: int
    first_block: Tensor
    segment_decay: Tensor

    @classmethod
    def of(cls, sizes: list[int], decays: list[float], device: torch.device, own: Tensor | None = None) -> Segments:
        """The layout of tensors of `sizes` elements, in order.

        own (own blocks,) int64: numbers of the blocks that this process holds; None: all. There may be more numbers
        than blocks.
        """
        blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)])
        total = int(first[-1])
        own = torch.arange(total) if own is None else own
        segment = torch.searchsorted(first[1:].contiguous(), own, right=True)
        decay = torch.tensor([*decays, 0.0], dtype=torch.float32)
        runs, lengths = torch.unique_consecutive(segment, return_counts=True)
        return cls(
            padded=tuple((lengths * BLOCK).tolist()),
            decays=tuple([*decays, 0.0][run] for run in runs.tolist()),
            block_decay=decay[segment].to(device),
            block_segment=segment.to(device, torch.int32),
            blocks=total,
            first_block=first.to(device, torch.int32),
            segment_decay=decay[:-1].to(device),
        )


@dataclass
class FlatBuffers:
    """What an update reads and writes; the vectors have one length, that of all blocks of this process.

    grad (n,) fp32, bf16 or fp16; master, exp_avg (n,) fp32, exp_avg_sq (n,) fp32 or None (SGD, whose momentum is
    exp_avg), ema (n,) fp32 or None, compute (n,) any float dtype or None where the master weights are computed with.
    norm () fp32: last gradient norm. skipped () int64: updates that did not happen. steps () fp32: last one that did.
    gather: makes (k, own blocks) of every process (k, blocks) in the order of the segments; None where one holds all.
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
    gather: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        like: dict[str, Any] = {"dtype": self.master.dtype, "device": self.master.device}
        blocks = self.master.numel() // BLOCK
        self.squares = torch.zeros((2, blocks), **like)  # sums of squares of own blocks
        self.norm_partials = torch.zeros(PARTS, **like)
        self.ratios = torch.ones(len(self.segments.segment_decay) + 1, **like)

    def of_all(self, squares: Tensor) -> Tensor:
        """The sums of squares (k, blocks) of all blocks, from those of this process's own (k, own blocks)."""
        return self.gather(squares) if self.gather else squares


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
