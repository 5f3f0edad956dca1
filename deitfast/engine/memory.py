"""How much memory a step takes, from a formula: what `--micro-batch 0` reads instead of trying until it crashes."""

from __future__ import annotations

from typing import Any

import torch

from deitfast.distributed import World
from deitfast.model.deit import DeiT, prefix_alone
from deitfast.model.fused import (
    FusedBlock,
    runs_kernels,
    saved_bytes_of_hidden,
    saved_bytes_of_keys_and_values,
    saved_bytes_per_token,
)
from deitfast.recipe import Recipe

LARGEST_ON_CPU = 32
LARGEST_EVALUATED = 256
"""Images evaluated at once: more are no faster, and their activations lie beside the training step's memory."""
_USABLE = 0.9  # share of the free memory to plan with: fragmentation, workspaces of cuBLAS, the input pipeline
_EAGER_CHANNELS = 24  # what autograd keeps of an eager block, in widths a token: an upper bound
_EAGER_HIDDEN_CHANNELS = 9  # those of them that `recompute` computes again: a lower bound
_EAGER_LAST_CHANNELS = 10  # the same of a last block that runs for the prefix alone: stream, LayerNorm, keys, values


def state_bytes(parameters: int, recipe: Recipe, bf16: bool, accumulates: bool, processes: int = 1) -> int:
    """Bytes of weights, gradients, moments, average and low-precision copy in the flat buffers of one process."""
    gradients = 2 + 2 + 4 * accumulates if bf16 else 4  # bf16 gradients and weights; fp32 sums over micro-batches
    shard = 4 * ((2 if recipe.optimizer != "sgd" else 1) + bool(recipe.ema_decay))
    if processes > 1:
        shard += 4 + 4 + 2 * bf16  # its own gradients, master weights and compute copy
    return parameters * (4 + gradients) + parameters * shard // processes


def image_parts(model: DeiT, recipe: Recipe, bf16: bool, kernels: bool | None = None) -> dict[str, int]:
    """Bytes that one image of a micro-batch needs while its gradients are computed, by what they are for.

    kernels: whether fused blocks run their ops; None: as they do here.
    """
    block: Any = model.blocks[0]
    itemsize, width, hidden, depth = (2 if bf16 else 4), model.width, block.mlp.fc1.out_features, len(model.blocks)
    tokens = model.pos_embed.shape[1]
    if isinstance(block, FusedBlock) and (runs_kernels() if kernels is None else kernels):
        saved, last = saved_bytes_per_token(width, hidden, itemsize), saved_bytes_of_keys_and_values(width, itemsize)
        again = saved_bytes_of_hidden(width, hidden, itemsize)
    else:
        channels = _EAGER_CHANNELS, _EAGER_LAST_CHANNELS, _EAGER_HIDDEN_CHANNELS
        saved, last, again = (count * width * itemsize for count in channels)
    again *= recipe.recompute
    saved -= again
    if prefix_alone(model.blocks[-1]):
        of_blocks = tokens * ((depth - 1) * saved + last) + model.num_prefix_tokens * saved
    else:
        of_blocks = tokens * depth * saved
    backward = (2 * hidden + 4 * width) * itemsize + again  # alive at once inside a block
    pixels = 3 * model.image_size**2
    return {
        "kept for the backward": of_blocks,
        "the backward of a block": tokens * backward,
        "images and logits": pixels * (1 + itemsize) + 16 * model.num_classes,
    }


def evaluated_image_bytes(model: DeiT, bf16: bool) -> int:
    """Bytes that one image needs while it is evaluated: an fp32 stream, and a block's widest products beside it."""
    block: Any = model.blocks[0]
    itemsize, width, hidden = (2 if bf16 else 4), model.width, block.mlp.fc1.out_features
    a_token = 3 * width * 4 + max(2 * hidden, 5 * width) * itemsize
    return model.pos_embed.shape[1] * a_token + 3 * model.image_size**2 * (1 + 2 * 4)


def free_bytes(device: torch.device) -> int:
    """Memory of the GPU that this process can still get, torch's own cache included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def largest_micro_batch(model: DeiT, recipe: Recipe, world: World, bf16: bool, teacher_image_bytes: int = 0) -> int:
    """Images that fit into this process's GPU at once, at least 1; a fixed number on CPU.

    teacher_image_bytes: of one image in the teacher, which runs before the student and gives its memory back.
    """
    if world.device.type != "cuda":
        return LARGEST_ON_CPU
    free = free_bytes(world.device)
    if world.size > 1 and world.wire == torch.bfloat16:
        free -= 2 * sum(p.numel() for p in model.parameters())  # what is sent of sums in fp32
    return images_that_fit(free, model, recipe, bf16, world.size, teacher_image_bytes)


def images_that_fit(
    free: float,
    model: DeiT,
    recipe: Recipe,
    bf16: bool,
    processes: int,
    teacher_image_bytes: int = 0,
    kernels: bool | None = None,
) -> int:
    """Images that a GPU with `free` bytes holds at once, at least 1."""
    parameters = sum(p.numel() for p in model.parameters())
    left = _USABLE * free - state_bytes(parameters, recipe, bf16, accumulates=True, processes=processes)
    trained = max(sum(image_parts(model, recipe, bf16, kernels).values()), teacher_image_bytes)
    # Evaluation comes beside the step's memory, which a graph keeps. It is a graph too, with a pool of its own, beside
    # which what it replays runs once uncaptured, to be compared.
    evaluated = 2 * evaluated_image_bytes(model, bf16)
    left -= 2 * 2 * parameters * bf16  # the weights as autocast casts them
    if processes > 1 and recipe.ema_decay:
        left -= 4 * parameters  # their average, whole
    most = left / (trained + evaluated)
    if most > LARGEST_EVALUATED:
        most = (left - LARGEST_EVALUATED * evaluated) / trained
    return max(1, int(most))
