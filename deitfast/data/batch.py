"""The device stage: normalise, erase, mix; in one kernel to patches (`prepare_patches`), or in steps to images.

Order as in DeiT: (crop, flip, RandAugment: done before, on uint8) -> normalise -> erase -> mixup or cutmix. The steps
are plain PyTorch on any device, without waiting for it and without a loop over samples: the kernel's reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deitfast.data.philox import NOISE, counter, normal_pair, philox4x32, unit
from deitfast.kernels.input import input_patches

if TYPE_CHECKING:
    from deitfast.recipe import Recipe

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Batch:
    """One micro-batch of a training step: m samples, of which rows s and s xor 1 are a mixup pair.

    images: uint8 (m, H, W, 3), after crop, flip and the policy, on the device. labels: int64 (m,), on the device. The
    device stage (`augment`) reads the rest: small tensors on the device, one row a sample.
    """

    step: int  # global optimisation step
    micro: int  # which micro-batch of this process in the step
    epoch: int
    seed: int
    images: torch.Tensor
    labels: torch.Tensor
    slots: np.ndarray  # int64 (m,), slots of the global batch
    index: torch.Tensor  # int64 (m,), image in the manifest (its replacement, where one is unreadable)
    view: torch.Tensor  # int64 (m,), copy of repeated augmentation
    erase: torch.Tensor  # int64 (m, 4), erased rectangle (top, left, height, width), zeros where there is none
    erased_pixels: int  # sum of the rectangles' areas, known on the host
    lam: torch.Tensor  # float32 (m,), weight of the own label
    mix_box: torch.Tensor  # int64 (m, 4), rectangle that cutmix takes from the partner, zeros for mixup
    mixes: bool  # whether the recipe mixes at all


@dataclass
class Targets:
    """Soft targets of a mixed batch, unexpanded: lam * smoothed(labels) + (1 - lam) * smoothed(partner_labels).

    labels, partner_labels: int64 (m,); lam: float32 (m,); smoothing: mass spread evenly over all classes.
    """

    labels: torch.Tensor
    partner_labels: torch.Tensor
    lam: torch.Tensor
    smoothing: float

    def dense(self, num_classes: int) -> torch.Tensor:
        """The same as a float32 (m, num_classes) matrix, whose rows sum to 1."""
        off = self.smoothing / num_classes
        target = torch.full((len(self.labels), num_classes), off, device=self.labels.device)
        lam = self.lam[:, None]
        target.scatter_add_(1, self.labels[:, None], (1 - self.smoothing) * lam)
        return target.scatter_add_(1, self.partner_labels[:, None], (1 - self.smoothing) * (1 - lam))


def prepare(
    batch: Batch,
    recipe: Recipe,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, Targets]:
    """Network input of a training micro-batch, (m, 3, H, W) computed in float32, returned in `dtype`; its targets."""
    x = normalise(batch.images, mean, std)
    if batch.erased_pixels:
        erase(x, batch)
    if batch.mixes:
        x = mix(x, batch.lam, batch.mix_box)
    return x.to(dtype), targets(batch, recipe.smoothing)


def prepare_patches(
    batch: Batch,
    patch_size: int,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> torch.Tensor:
    """The images of `prepare` as patches (m, H / patch_size * W / patch_size, 3 * patch_size**2) of `dtype`.

    Patches are row by row, each in the order of `conv.weight.flatten(1)`: channel, y, x. One kernel on CUDA.
    """
    return input_patches(
        batch.images,
        batch.erase,
        batch.mix_box,
        batch.lam,
        batch.index,
        batch.view,
        torch.full((1,), batch.epoch, dtype=torch.int64, device=batch.images.device),
        seed=batch.seed,
        patch_size=patch_size,
        mean=mean,
        std=std,
        dtype=dtype,
        mixes=batch.mixes,
    )


def targets(batch: Batch, smoothing: float) -> Targets:
    """The soft targets that belong to the mixed images of a batch."""
    return mixed_targets(batch.labels, batch.lam, batch.mixes, smoothing)


def mixed_targets(labels: torch.Tensor, lam: torch.Tensor, mixes: bool, smoothing: float) -> Targets:
    """The same from its parts; `mixes`: whether rows are mixed with their partners at all."""
    return Targets(labels, partner_rows(labels) if mixes else labels, lam, smoothing)


def normalise(
    images: torch.Tensor,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 (m, H, W, 3) to (m, 3, H, W) of `dtype`, contiguous: (x / 255 - mean) / std, per channel in RGB order."""
    x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    scale = _channels(x, [1 / (255 * s) for s in std])
    shift = _channels(x, [-m / s for m, s in zip(mean, std, strict=True)])
    return x.mul_(scale).add_(shift).to(dtype)


def erase(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Fill each sample's rectangle with N(0, 1) noise, per pixel and channel, in place.

    The noise of pixel (y, x) is the Philox block y * W + x of the sample's NOISE stream: one normal a channel.
    """
    top, left, height, width = batch.erase.unbind(1)
    # One row for each erased pixel of the batch; the total is known on the host, so nothing waits for the device.
    area = height * width
    sample = torch.arange(len(x), device=x.device).repeat_interleave(area, output_size=batch.erased_pixels)
    first = area.cumsum(0) - area
    k = torch.arange(batch.erased_pixels, device=x.device) - first[sample]
    row, column = top[sample] + k // width[sample], left[sample] + k % width[sample]

    word = counter(NOISE, row * x.shape[3] + column)
    epoch = torch.full((1,), batch.epoch, dtype=torch.int64, device=x.device)
    words = philox4x32(batch.index[sample], epoch, batch.view[sample], word, batch.seed)
    u = [unit(w).double() for w in words]
    red, green = normal_pair(u[0], u[1], torch)
    blue, _ = normal_pair(u[2], u[3], torch)
    x[sample, :, row, column] = torch.stack([red, green, blue], dim=1).to(x.dtype)
    return x


def mix(x: torch.Tensor, lam: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Mixup or cutmix of every sample with its partner, the neighbour in its pair (row xor 1).

    x: (m, 3, H, W). lam: float32 (m,), weight of the own image for mixup. box: int64 (m, 4) (top, left, height, width):
    where it is not empty, the sample takes the rectangle from its partner and keeps the rest (cutmix).
    """
    partner = partner_rows(x)
    top, left, height, width = (b[:, None, None, None] for b in box.unbind(1))
    cut = height * width > 0
    y = torch.arange(x.shape[2], device=x.device)[:, None]
    z = torch.arange(x.shape[3], device=x.device)
    inside = (y >= top) & (y < top + height) & (z >= left) & (z < left + width)
    own = torch.where(cut, (~inside).to(x.dtype), lam.to(x.dtype)[:, None, None, None])
    return x * own + partner * (1 - own)


def partner_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows with the two of each pair exchanged; the number of rows is even."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _channels(like: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    return _channels_on(like.device, tuple(values))


@functools.cache
def _channels_on(device: torch.device, values: tuple[float, ...]) -> torch.Tensor:
    """Made once and waited for: a CUDA graph may not copy from the host, and any stream may read it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32).to(device).view(1, -1, 1, 1)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on the device; for a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
