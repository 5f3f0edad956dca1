"""The same run written as a plain loop of timm's parts: its model, transforms, Mixup, AdamW, scheduler and ModelEmaV2.

    python -m benchmarks.timm_loop --data DIR [--recipe mini_cifar10_cpu] [--seed 0] [--epochs N]

DIR holds train.tar and val.tar of class folders, such as `benchmarks.miniature` leaves in its runs/data. Prints top-1
of raw and averaged weights, and images/s. One process, fp32, no resumption; what timm's parts do not have in this form
(distillation, repeated augmentation, LAMB, BCE) is refused.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.measuring.command import fp32_is_fp32
from deitfast.cli.recipes import load_recipe
from deitfast.data import IMAGENET_MEAN, IMAGENET_STD
from deitfast.errors import DeitfastError
from deitfast.guard import guarded
from deitfast.model.zoo import find_variant
from deitfast.recipe import Recipe
from tests.reference import import_timm

_TAKEN = {
    "optimizer": "adamw", "distillation": "none", "repeats": 1, "loss": "ce", "drop_path_schedule": "linear",
    "drop_path_form": "bernoulli", "clip_norm": 0.0, "init": "", "color_jitter": 0.0, "layer_scale": 0.0,
}  # fmt: skip
"""What of a recipe is the same in every run of this loop."""


@dataclass(frozen=True)
class Trained:
    """top-1 in percent of raw and averaged weights; steps; mean loss of every epoch; time of the training alone."""

    raw: float
    ema: float
    steps: int
    loss: list[tuple[int, float]]
    cpu_seconds: float
    wall_seconds: float


def train(recipe: Recipe, device: str = "cpu") -> Trained:
    """The recipe by timm's parts. Raises DeitfastError for a setting that they do not have."""
    for name, value in _TAKEN.items():
        if getattr(recipe, name) != value:
            raise DeitfastError(f"timm's loop has no {name} {getattr(recipe, name)!r}. Give {value!r}")
    import_timm()
    from timm.data import Mixup
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV2

    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    loader, classes = batches(recipe, training=True)
    model = network(recipe, classes).to(device).train()
    averaged = ModelEmaV2(model, decay=recipe.ema_decay)
    optimizer = create_optimizer_v2(
        model, "adamw", lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(recipe.beta1, recipe.beta2),
        eps=recipe.adam_eps,
    )  # fmt: skip
    schedule = CosineLRScheduler(
        optimizer, t_initial=recipe.epochs * len(loader), lr_min=recipe.min_lr, t_in_epochs=False,
        warmup_t=round(recipe.warmup_epochs * len(loader)), warmup_lr_init=recipe.warmup_lr,
    )  # fmt: skip
    mix = Mixup(
        mixup_alpha=recipe.mixup, cutmix_alpha=recipe.cutmix, prob=recipe.mix_probability * recipe.mixes,
        switch_prob=recipe.mix_switch, label_smoothing=recipe.smoothing, num_classes=classes,
    )  # fmt: skip
    losses, step = [], 0
    cpu, wall = time.process_time(), time.monotonic()
    for _ in range(recipe.epochs):
        total = 0.0
        for images, labels in loader:
            schedule.step_update(step)
            mixed, targets = mix(images.to(device), labels.to(device))
            loss = F.cross_entropy(model(mixed), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averaged.update(model)
            total += loss.item()
            step += 1
        losses.append((step, round(total / len(loader), 4)))
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    held_out, _ = batches(recipe, training=False)
    return Trained(top1(model, held_out, device), top1(averaged.module, held_out, device), step, losses, cpu, wall)


def batches(recipe: Recipe, *, training: bool) -> tuple[DataLoader[Any], int]:
    """timm's data set and transforms of one split as a loader, and the number of classes."""
    import_timm()
    from timm.data import ImageDataset, create_transform

    size = recipe.image_size or find_variant(recipe.model).image_size
    transform: dict[str, Any] = {"interpolation": "bicubic", "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if training:
        transform |= {
            "is_training": True, "scale": (recipe.crop_min, recipe.crop_max), "hflip": recipe.flip, "color_jitter": 0.0,
            "auto_augment": None if recipe.rand_augment == "none" else recipe.rand_augment, "re_prob": recipe.erase,
            "re_mode": "pixel",
        }  # fmt: skip
    else:
        transform["crop_pct"] = recipe.eval_crop_ratio
    path = Path(recipe.data) / ("train.tar" if training else "val.tar")
    split = ImageDataset(str(path), transform=create_transform(size, **transform))
    batch = recipe.batch if training else 250
    loader = DataLoader(split, batch, shuffle=training, drop_last=training, num_workers=max(recipe.workers - 1, 0))
    return loader, len(split.reader.class_name_to_idx)


def network(recipe: Recipe, classes: int) -> nn.Module:
    """timm's network of the recipe's sizes."""
    variant = find_variant(recipe.model)
    if variant.distilled:
        raise DeitfastError(f"timm's loop has no {recipe.model}: it does not distil. Give a model without the token")
    import_timm()
    from timm.models import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=recipe.image_size or variant.image_size, patch_size=variant.patch_size, embed_dim=variant.width,
        depth=variant.depth, num_heads=variant.heads, num_classes=classes, drop_path_rate=recipe.drop_path,
    )  # fmt: skip
    return model


@torch.no_grad()
def top1(model: nn.Module, held_out: DataLoader[Any], device: str) -> float:
    """Percent."""
    model.eval()
    right = count = 0
    for images, labels in held_out:
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
        count += len(labels)
    return 100 * right / count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timm_loop", allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder with train.tar and val.tar of class folders")
    parser.add_argument("--recipe", default="mini_cifar10_cpu", help="name of a shipped recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--warmup-epochs", type=float, default=-1, help="-1: the recipe's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    options = parser.parse_args(argv)
    fp32_is_fp32()
    stated = load_recipe(options.recipe)
    epochs = options.epochs or stated.epochs
    warmup = options.warmup_epochs if options.warmup_epochs >= 0 else min(stated.warmup_epochs, epochs)
    done = train(
        replace(stated, data=options.data, seed=options.seed, epochs=epochs, warmup_epochs=warmup), options.device
    )
    images = done.steps * stated.batch
    print(
        f"timm's loop: top-1 {done.raw:.2f} %, ema {done.ema:.2f} %, {images / done.wall_seconds:,.0f} images/s "
        f"({images / done.cpu_seconds:,.0f} a second of CPU)"
    )
    return 0


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
