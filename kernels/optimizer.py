"""One update of all weights over flat buffers: gradient norm, clipping, AdamW, LAMB or SGD, EMA, low-precision copy.

A flat buffer holds every tensor of a model one after the other. Each tensor, a segment, starts at a multiple of BLOCK
elements and is padded with zeros, so that each block of BLOCK elements belongs to one tensor: a table gives a block's
weight decay, another its segment. With the gradient g scaled by the clip coefficient, t the update's number from 1:

    AdamW   m += (1 - b1) (g - m)      v = b2 v + (1 - b2) g^2      u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
            p = p (1 - lr wd) - lr u                                                        (torch.optim.AdamW)
    LAMB    m, v and u as above, u += wd p, and where wd != 0 u *= |p| / |u| of the segment, 1 where one of them is 0
            p -= lr u                                                                       (timm.optim.Lamb)
    SGD     g += wd p      m = b1 m + g      p -= lr (g + b1 m)                             (torch.optim.SGD, nesterov)
    all     ema += (1 - decay) (p - ema)      compute = p in the compute copy's dtype

LAMB is timm's with bias correction and gradient averaging; without trust clip, decoupled decay or adaptation of tensors
that are not decayed. The clip coefficient is min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it,
for LAMB min(1, clip / norm). Where the norm is infinite or NaN nothing changes, and a counter goes up by one.

Launches: the squares of the gradient are summed into a fixed number of partial sums, and every program of the next
kernel sums those in one order: no atomics, the same bits in every run and on every chip. AdamW and SGD then take one
kernel. LAMB takes three (moments and squares of p and u by block, the ratio of each segment, the weights), and
computes u twice rather than storing it. Nothing is read on the host, nothing is allocated: a CUDA graph captures it.

These are functions on buffers, in place, without autograd; they are not torch.library ops because no graph that
torch.compile or export sees ever contains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from deitfast.kernels.common import CompileCase, runs_triton
from deitfast.kernels.optimizer_eager import update_eager
from deitfast.kernels.optimizer_kernels import (
    Scalars,
    adamw_kernel,
    lamb_moments_kernel,
    lamb_ratio_kernel,
    lamb_weights_kernel,
    sgd_kernel,
    squared_norm_kernel,
)

Optimizer = Literal["adamw", "lamb", "sgd"]

BLOCK = 1024
"""Elements to whose multiples segments are aligned, and that a program updates at once: 8 a thread."""
NORM_BLOCK = 4096
PARTS = 528
"""Partial sums of the squared norm: four programs for each of an H100's 132 multiprocessors; fixed, for the bits."""
UPDATE_PROGRAMS = 8448
"""Most programs of an update: they fill any chip many times over, and in large models each takes several blocks."""


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


def update(optimizer: Optimizer, buffers: FlatBuffers, scalars: Tensor) -> None:
    """One update of `buffers`, in place. scalars: fp32 (12,), on their device, of the fields of `Scalars` in order.

    CPU tensors take `update_eager`, which also scales the gradient in place where it clips.
    """
    if runs_triton(buffers.master):
        with torch.cuda.device_of(buffers.master):
            update_triton(optimizer, buffers, scalars)
    else:
        update_eager(optimizer, buffers, Scalars(*scalars.tolist()))


def update_triton(optimizer: Optimizer, buffers: FlatBuffers, scalars: Tensor) -> None:
    """`update` by the kernels."""
    b, segments, n = buffers, buffers.segments, buffers.master.numel()
    blocks = n // BLOCK
    parts, programs = min(PARTS, triton.cdiv(n, NORM_BLOCK)), min(UPDATE_PROGRAMS, blocks)
    squared_norm_kernel[(parts,)](grad=b.grad, partials=b.norm_partials, n=n, NORM_BLOCK=NORM_BLOCK, num_warps=8)
    given = {"grad": b.grad, "block_decay": segments.block_decay, "partials": b.norm_partials, "scalars": scalars}
    written = {"norm": b.norm, "skipped": b.skipped, "steps": b.steps}
    sizes = {"parts": parts, "blocks": blocks, "BLOCK": BLOCK, "PARTS_BLOCK": triton.next_power_of_2(PARTS)}
    weights = {"master": b.master, "ema": b.ema, "compute": b.compute}
    if optimizer == "adamw":
        moments = {"exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
        adamw_kernel[(programs,)](**given, **weights, **moments, **written, **sizes)
    elif optimizer == "sgd":
        sgd_kernel[(programs,)](**given, **weights, exp_avg=b.exp_avg, **written, **sizes)
    else:
        moments = {"exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
        squares = {"weight_squares": b.lamb_partials[0], "update_squares": b.lamb_partials[1]}
        lamb_moments_kernel[(programs,)](**given, master=b.master, **moments, **squares, **written, **sizes)
        lamb_ratio_kernel[(len(segments.padded),)](
            block_decay=segments.block_decay,
            first_block=segments.first_block,
            **squares,
            ratios=b.ratios,
            BLOCK=BLOCK,
        )
        lamb_weights_kernel[(programs,)](
            **moments,
            block_decay=segments.block_decay,
            block_segment=segments.block_segment,
            ratios=b.ratios,
            norm=b.norm,
            scalars=scalars,
            **weights,
            blocks=blocks,
            BLOCK=BLOCK,
        )


def compile_cases(arch: int) -> list[CompileCase]:
    """Every kernel with a bf16 compute copy and EMA, AdamW also in fp32 with neither; launches ignore `arch`."""
    names = (
        "grad block_decay partials scalars master exp_avg exp_avg_sq ema compute norm steps weight_squares "
        "update_squares ratios"
    )
    types = dict.fromkeys(names.split(), "*fp32") | dict.fromkeys(("parts", "blocks", "n"), "i32")
    types |= {"skipped": "*i64", "block_segment": "*i32", "first_block": "*i32"}
    values = {"BLOCK": BLOCK, "NORM_BLOCK": NORM_BLOCK, "PARTS_BLOCK": triton.next_power_of_2(PARTS)}
    kernels = (squared_norm_kernel, adamw_kernel, sgd_kernel, lamb_moments_kernel, lamb_ratio_kernel)
    cases = []
    for kernel, dtype in (*((kernel, "bf16") for kernel in (*kernels, lamb_weights_kernel)), (adamw_kernel, "fp32")):
        known = values if dtype == "bf16" else values | {"ema": None, "compute": None}
        constexprs = {name: known[name] for name in kernel.arg_names if name in known}
        typed = types | {"grad": f"*{dtype}", "compute": f"*{dtype}"}
        cases.append(
            CompileCase(
                name=f"{kernel.__name__.removesuffix('_kernel')} {dtype}",
                kernel=kernel,
                signature={name: typed[name] for name in kernel.arg_names if name not in constexprs},
                constexprs=constexprs,
                num_warps=8 if kernel is squared_norm_kernel else 4,
                num_stages=3,
                matrix=False,
                not_divisible=frozenset({"parts", "blocks"} & set(kernel.arg_names)),
            )
        )
    return cases
