"""How much memory a step takes, from a formula: what `--micro-batch 0` reads instead of trying until it crashes."""

from __future__ import annotations

from typing import Any

import torch

from deitfast.distributed import World
from deitfast.model.deit import DeiT
from deitfast.model.fused import FusedBlock, runs_kernels, saved_bytes_per_token
from deitfast.recipe import Recipe

LARGEST_ON_CPU = 32
_USABLE = 0.9  # share of the free memory to plan with: fragmentation, workspaces of cuBLAS, the input pipeline
_EAGER_CHANNELS = 24  # what autograd keeps of an eager block, in widths a token: an upper bound


def state_bytes(parameters: int, recipe: Recipe, bf16: bool, accumulates: bool) -> int:
    """Bytes of weights, gradients, moments, average and low-precision copy in the flat buffers."""
    fp32 = 1 + (2 if recipe.optimizer != "sgd" else 1) + bool(recipe.ema_decay)
    gradients = 2 + 2 + 4 * accumulates if bf16 else 4  # bf16 gradients and weights; fp32 sums over micro-batches
    return parameters * (4 * fp32 + gradients)


def image_bytes(model: DeiT, recipe: Recipe, bf16: bool) -> int:
    """Bytes that one image of a micro-batch needs while its gradients are computed."""
    block: Any = model.blocks[0]
    itemsize, width, hidden, depth = (2 if bf16 else 4), model.width, block.mlp.fc1.out_features, len(model.blocks)
    tokens = model.pos_embed.shape[1]
    if isinstance(block, FusedBlock) and runs_kernels():
        saved = saved_bytes_per_token(width, hidden, itemsize)
    else:
        saved = _EAGER_CHANNELS * width * itemsize
    of_blocks = depth * width * itemsize + saved if recipe.recompute else depth * saved
    backward = (2 * hidden + 4 * width) * itemsize  # gradients alive at once inside a block
    pixels = 3 * model.image_size**2
    return tokens * (of_blocks + backward) + pixels * (1 + itemsize) + 16 * model.num_classes


def largest_micro_batch(model: DeiT, recipe: Recipe, world: World, bf16: bool) -> int:
    """Images that fit into this process's GPU at once, at least 1; a fixed number on CPU."""
    if world.device.type != "cuda":
        return LARGEST_ON_CPU
    free, _ = torch.cuda.mem_get_info(world.device)
    parameters = sum(p.numel() for p in model.parameters())
    left = _USABLE * free - state_bytes(parameters, recipe, bf16, accumulates=True)
    return max(1, int(left / image_bytes(model, recipe, bf16)))
