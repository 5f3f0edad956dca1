"""One update of all weights over flat buffers: gradient norm, clipping, AdamW, LAMB or SGD, EMA, low-precision copy.

The buffers: flat_buffers.py. With the gradient g scaled by the clip coefficient, t the update's number from 1:

    AdamW   m += (1 - b1) (g - m)      v = b2 v + (1 - b2) g^2      u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
            p = p (1 - lr wd) - lr u                                                        (torch.optim.AdamW)
    LAMB    m, v and u as above, u += wd p, and where wd != 0 u *= |p| / |u| of the segment, 1 where one of them is 0
            p -= lr u                                                                       (timm.optim.Lamb)
    SGD     g += wd p      m = b1 m + g      p -= lr (g + b1 m)                             (torch.optim.SGD, nesterov)
    all     ema += (1 - decay) (p - ema)      compute = p in the compute copy's dtype

LAMB is timm's with bias correction and gradient averaging; without trust clip, decoupled decay or adaptation of tensors
that are not decayed. The clip coefficient is min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it,
for LAMB min(1, clip / norm). Where the norm is infinite or NaN nothing changes, and a counter goes up by one.

Launches: the squares of the gradient are summed block by block, those sums into a fixed number of partial sums, and
every program of the next kernel sums those in one order: no atomics, the same bits in every run, on every chip, and
with the blocks spread over any number of processes. AdamW and SGD then take one kernel. LAMB takes three (moments and
squares of p and u by block, the ratio of each segment, the weights), and computes u twice rather than storing it.
Nothing is read on the host: a CUDA graph captures it.

These are functions on buffers, in place, without autograd; they are not torch.library ops because no graph that
torch.compile or export sees ever contains them.
"""

from __future__ import annotations

from dataclasses import replace

import triton
from torch import Tensor

from deitfast.kernels.common import Launch, launch, runs_triton
from deitfast.kernels.flat_buffers import BLOCK, PARTS, FlatBuffers, Optimizer, Scalars
from deitfast.kernels.optimizer_eager import update_eager, update_reference
from deitfast.kernels.optimizer_kernels import (
    adamw_kernel,
    block_squares_kernel,
    lamb_moments_kernel,
    lamb_ratio_kernel,
    lamb_weights_kernel,
    sgd_kernel,
    sum_squares_kernel,
)
from deitfast.kernels.replaced import CHOSEN

BLOCK_LAUNCH = Launch({"BLOCK": BLOCK}, num_warps=4, num_stages=3)
UPDATE_LAUNCH = replace(BLOCK_LAUNCH, tiles={"BLOCK": BLOCK, "PARTS_BLOCK": triton.next_power_of_2(PARTS)})
"""Of the kernels that also sum up the norm."""
UPDATE_PROGRAMS = 8448
"""Most programs of an update: they fill any chip many times over, and in large models each takes several blocks."""


def update(optimizer: Optimizer, buffers: FlatBuffers, scalars: Tensor) -> None:
    """One update of `buffers`, in place. scalars: fp32 (12,), on their device, of the fields of `Scalars` in order.

    CPU tensors take `update_eager`, which also scales the gradient in place where it clips. Where the optimiser's name
    is in `replaced.CHOSEN`, `update_reference` takes the kernels' place.
    """
    if optimizer in CHOSEN:
        update_reference(optimizer, buffers, scalars)
    elif runs_triton(buffers.master):
        update_triton(optimizer, buffers, scalars)
    else:
        update_eager(optimizer, buffers, Scalars(*scalars.tolist()))


def update_triton(optimizer: Optimizer, buffers: FlatBuffers, scalars: Tensor) -> None:
    """`update` by the kernels."""
    b, segments, blocks = buffers, buffers.segments, buffers.master.numel() // BLOCK
    parts, grid = min(PARTS, triton.cdiv(segments.blocks, BLOCK)), (min(UPDATE_PROGRAMS, blocks),)
    launch(block_squares_kernel, grid, BLOCK_LAUNCH, grad=b.grad, squares=b.squares[0], blocks=blocks)
    squares = b.of_all(b.squares[:1])[0]
    launch(
        sum_squares_kernel, (parts,), BLOCK_LAUNCH, squares=squares, partials=b.norm_partials, blocks=segments.blocks
    )
    given = {"grad": b.grad, "block_decay": segments.block_decay, "partials": b.norm_partials, "scalars": scalars}
    written = {"norm": b.norm, "skipped": b.skipped, "steps": b.steps}
    sizes = {"parts": parts, "blocks": blocks}
    weights = {"master": b.master, "ema": b.ema, "compute": b.compute}
    moments = {"exp_avg": b.exp_avg, "exp_avg_sq": b.exp_avg_sq}
    if optimizer == "adamw":
        launch(adamw_kernel, grid, UPDATE_LAUNCH, **given, **weights, **moments, **written, **sizes)
    elif optimizer == "sgd":
        launch(sgd_kernel, grid, UPDATE_LAUNCH, **given, **weights, exp_avg=b.exp_avg, **written, **sizes)
    else:
        launch(
            lamb_moments_kernel, grid, UPDATE_LAUNCH,
            **given, master=b.master, **moments, weight_squares=b.squares[0], update_squares=b.squares[1],
            **written, **sizes,
        )  # fmt: skip
        weight_squares, update_squares = b.of_all(b.squares)
        launch(
            lamb_ratio_kernel, (len(segments.segment_decay),), BLOCK_LAUNCH,
            segment_decay=segments.segment_decay, first_block=segments.first_block,
            weight_squares=weight_squares, update_squares=update_squares, ratios=b.ratios,
        )  # fmt: skip
        launch(
            lamb_weights_kernel, grid, BLOCK_LAUNCH,
            **moments, block_decay=segments.block_decay, block_segment=segments.block_segment, ratios=b.ratios,
            norm=b.norm, scalars=scalars, **weights, blocks=blocks,
        )  # fmt: skip
