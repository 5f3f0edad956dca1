"""A micro-batch, and what the device makes of it: normalised, erased, mixed patches or images, and soft targets.

Order as in DeiT: (crop, flip, RandAugment: done before, on uint8) -> normalise -> erase -> mixup or cutmix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deitfast.kernels.input import input_patches, input_patches_reference

if TYPE_CHECKING:
    from deitfast.recipe import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_TENSORS = ("images", "labels", "index", "view", "epoch", "erase", "lam", "mix_box")


@dataclass
class Batch:
    """One micro-batch of a training step: m samples, of which rows s and s xor 1 are a mixup pair.

    What changes from step to step is in tensors, all on one device, so that a CUDA graph can replay what reads them.
    """

    images: torch.Tensor  # uint8 (m, H, W, 3), after crop, flip and augmentation
    labels: torch.Tensor  # int64 (m,)
    index: torch.Tensor  # int64 (m,), image in the manifest (its replacement, where one is unreadable)
    view: torch.Tensor  # int64 (m,), copy of repeated augmentation
    epoch: torch.Tensor  # int64 (1,)
    erase: torch.Tensor  # int64 (m, 4), erased rectangle (top, left, height, width), zeros where there is none
    lam: torch.Tensor  # float32 (m,), weight of the own label
    mix_box: torch.Tensor  # int64 (m, 4), rectangle that cutmix takes from the partner, zeros for mixup
    step: int  # global optimisation step
    slots: np.ndarray  # int64 (m,), slots of the global batch
    drop: list[torch.Tensor] = field(default_factory=list)  # drop-path of the model's blocks, drawn by the engine

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in _TENSORS] + self.drop

    def to(self, device: torch.device) -> Batch:
        """The same on a device; to a GPU through pinned memory, without waiting."""
        return self._each(lambda tensor: to_device(tensor, device))

    def clone(self) -> Batch:
        """The same in memory of its own: a graph's static input."""
        return self._each(torch.Tensor.clone)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _TENSORS}
        return replace(self, drop=[change(tensor) for tensor in self.drop], **changed)


@dataclass
class Targets:
    """Soft targets of a mixed batch, unexpanded: lam * smoothed(labels) + (1 - lam) * smoothed(partner_labels).

    labels, partner_labels: int64 (m,); lam: float32 (m,); smoothing: mass spread evenly over all classes.
    """

    labels: torch.Tensor
    partner_labels: torch.Tensor
    lam: torch.Tensor
    smoothing: float


def targets(batch: Batch, recipe: Recipe) -> Targets:
    """The soft targets that belong to a batch's mixed images."""
    partners = batch.labels.unflatten(0, (-1, 2)).flip(1).flatten() if recipe.mixes else batch.labels
    return Targets(batch.labels, partners, batch.lam, recipe.smoothing)


def prepare(batch: Batch, recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, Targets]:
    """Network input of a training micro-batch, (m, 3, H, W) of `dtype`, in eager PyTorch; its targets."""
    side = batch.images.shape[1]
    return _patches(input_patches_reference, batch, recipe, side, dtype).view(-1, 3, side, side), targets(batch, recipe)


def prepare_patches(batch: Batch, recipe: Recipe, patch_size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The images of `prepare` as patches (m, H / patch_size * W / patch_size, 3 * patch_size**2) of `dtype`.

    Patches are row by row, each in the order of `conv.weight.flatten(1)`: channel, y, x. One kernel on CUDA.
    """
    return _patches(input_patches, batch, recipe, patch_size, dtype)


def _patches(
    make: Callable[..., torch.Tensor], batch: Batch, recipe: Recipe, patch_size: int, dtype: torch.dtype
) -> torch.Tensor:
    return make(
        batch.images, batch.erase, batch.mix_box, batch.lam, batch.index, batch.view, batch.epoch,
        seed=recipe.seed, patch_size=patch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype, mixes=recipe.mixes,
    )  # fmt: skip


def normalise(
    images: torch.Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 (m, H, W, 3) to (m, 3, H, W) of `dtype`, contiguous: (x / 255 - mean) / std, per channel in RGB order."""
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    scale = _channels(x.device, tuple(1 / (255 * s) for s in std))
    shift = _channels(x.device, tuple(-m / s for m, s in zip(mean, std, strict=True)))
    return x.mul_(scale).add_(shift).to(dtype)


@functools.cache
def _channels(device: torch.device, values: tuple[float, ...]) -> torch.Tensor:
    """Made once and waited for: a CUDA graph may not copy from the host, and any stream may read it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32).to(device).view(1, -1, 1, 1)


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; for a GPU through pinned memory, without waiting."""
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if tensor.device == device or device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
