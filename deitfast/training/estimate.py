"""What a recipe will take, before it runs: parameters, FLOPs, memory by part, the largest batch, least hours and cost.

Memory is the formula that `--micro-batch 0` reads. Time is the roofline's: no run is faster, and how much slower one is
has not been measured. Nothing here asks a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deitfast.distributed import World
from deitfast.engine.memory import image_parts, images_that_fit, state_bytes
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model
from deitfast.model.work import Gpu, forward_macs, part_floors
from deitfast.model.zoo import Variant, find_variant
from deitfast.recipe import Recipe
from deitfast.training.run import split_batch


@dataclass(frozen=True)
class Estimate:
    """What a recipe takes on `gpus` of `gpu`.

    macs: multiply-adds of a forward pass, an image. memory: bytes of one GPU by part, at `micro_batch` images. largest:
    images that one GPU holds at once. images_per_second, hours: of all GPUs together, at the roofline: a bound.
    """

    recipe: Recipe
    gpu: Gpu
    gpus: int
    parameters: int
    macs: float
    memory: dict[str, int]
    largest: int
    micro_batch: int
    accumulation: int
    images_per_second: float
    hours: float


def estimate(recipe: Recipe, gpu: Gpu, gpus: int, classes: int, images: int) -> Estimate:
    """What `recipe` takes on so many GPUs of a kind, for a data set of so many classes and training images.

    Raises DeitfastError for an unknown model, and for a batch that the GPUs cannot share.
    """
    variant = variant_of(recipe)
    scale = recipe.layer_scale or None
    with torch.device("meta"):  # its shapes are all that is asked of it
        model = create_model(
            recipe.model, num_classes=classes, image_size=variant.image_size, layer_scale=scale, fused=True
        )
    bf16 = recipe.precision != "fp32"
    largest = images_that_fit(1e9 * gpu.gigabytes, model, recipe, bf16, gpus, kernels=True)
    world = World(0, gpus, 0, torch.device("cuda"))
    micro_batch, accumulation = split_batch(recipe, world, largest)
    speed = gpus * speed_bound(variant, micro_batch * accumulation, gpu, recipe.recompute)
    memory = memory_parts(model, recipe, micro_batch, accumulation > 1 or gpus > 1, bf16, gpus)
    return Estimate(
        recipe, gpu, gpus, sum(p.numel() for p in model.parameters()), forward_macs(variant), memory, largest,
        micro_batch, accumulation, speed, recipe.epochs * images / speed / 3600,
    )  # fmt: skip


def variant_of(recipe: Recipe) -> Variant:
    """The model of a recipe, at the size that it is trained at."""
    variant = find_variant(recipe.model)
    return replace(variant, image_size=recipe.image_size or variant.image_size)


def least_hours(recipe: Recipe, gpu: Gpu, images: int) -> float:
    """Hours that one GPU needs at least for `recipe` on so many training images, at the roofline."""
    return recipe.epochs * images / speed_bound(variant_of(recipe), recipe.batch, gpu, recipe.recompute) / 3600


def memory_parts(
    model: DeiT, recipe: Recipe, micro_batch: int, accumulates: bool, bf16: bool, processes: int = 1
) -> dict[str, int]:
    """Bytes of a training step of a model whose fused blocks run their ops, by what they are for."""
    parameters = sum(p.numel() for p in model.parameters())
    state = {"weights, gradients, optimiser": state_bytes(parameters, recipe, bf16, accumulates, processes)}
    parts = image_parts(model, recipe, bf16, kernels=True)
    return state | {name: micro_batch * size for name, size in parts.items()}


def speed_bound(variant: Variant, images: int, gpu: Gpu, recompute: bool) -> float:
    """Images a second that one GPU at most trains, with `images` a step."""
    return 1e6 / sum(part_floors(variant, images, gpu.tflops, gpu.gbps, recompute).values())


def table(found: Estimate, price: float) -> str:
    """The estimate in words and numbers. price: of an hour of one GPU; 0: unknown."""
    recipe, gpu = found.recipe, found.gpu
    total = sum(found.memory.values())
    lines = [
        f"{recipe.model}: {found.parameters / 1e6:.2f} M parameters, {found.macs / 1e9:.2f} G multiply-adds forward, "
        f"{6 * found.macs / 1e9:.1f} GFLOP a trained image",
        f"memory of one {gpu.name} at {found.micro_batch} images at once, by the formula of --micro-batch 0:",
        *(f"  {size / 1e9:8.2f} GB  {name}" for name, size in found.memory.items()),
        f"  {total / 1e9:8.2f} GB  of {gpu.gigabytes:g}; evaluation, and what the libraries keep, come on top",
        f"largest micro-batch: {found.largest}; batch {recipe.batch} = {found.gpus} GPU(s) x {found.accumulation} "
        f"accumulated x {found.micro_batch}",
        f"at most {found.images_per_second:,.0f} images/s, so at least {found.hours:.1f} h for {recipe.epochs} epochs",
        "  a prediction: the roofline's bound on paper, without data, communication and evaluation. Not a measurement",
    ]
    if price:
        lines.append(f"at {price:g} an hour of a GPU: at least {price * found.hours * found.gpus:,.2f}")
    return "\n".join(lines)
