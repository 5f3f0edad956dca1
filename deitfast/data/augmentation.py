"""The augmentation policy: what happens to a view between the flip and the normalisation.

    rand_augment    color_jitter    a view gets
    rand-m...       ignored         RandAugment (timm ignores colour jitter, too, where auto-augment is on)
    three           s               one of grayscale, solarize and blur, then jitter of strength s (DeiT III)
    none            s               jitter of strength s; nothing for s = 0 ("simple": crop and flip alone)

What is drawn is a pure function of (seed, epoch, index, view). On a GPU one call is a few Triton launches that nothing
waits for; on a CPU a view is one call of `cpu_ops`. Both equal PIL in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from deitfast.data import augmentation_draws, cpu_ops
from deitfast.data.augmentation_draws import OP, OPS, WARPS, AugmentationDraws, RandAugment
from deitfast.data.batch import to_device
from deitfast.kernels.common import runs_triton
from deitfast.kernels.image_ops import CODES, COLUMNS, image_ops

if TYPE_CHECKING:
    from deitfast.recipe import Recipe

FILL = (124, 116, 104)
"""What warps put outside the image: ImageNet's mean colour, as timm rounds it."""


class Augmentation:
    """A recipe's augmentation of uint8 views. Draws and applies; both may be called from several threads.

    active: False where the recipe has none, and `apply` returns the images as they are.
    """

    def __init__(self, recipe: Recipe, image_size: int, device: torch.device) -> None:
        self.seed, self.image_size, self.device = recipe.seed, image_size, torch.device(device)
        self._three = recipe.rand_augment == "three"
        self._parts: list[Callable[..., AugmentationDraws]] = []
        if self._three:
            self._parts.append(augmentation_draws.three_augment)
        elif recipe.rand_augment != "none":
            self._parts.append(RandAugment.parse(recipe.rand_augment).draw)
        if recipe.color_jitter > 0 and recipe.rand_augment in ("none", "three"):
            self._parts.append(partial(augmentation_draws.color_jitter, recipe.color_jitter))
        self.active = bool(self._parts)

    def draw(self, index: np.ndarray, epoch: int, view: np.ndarray) -> AugmentationDraws:
        """The operations of m views; index (image in the manifest), view (copy of it): int64 (m,)."""
        drawn = [part(index, epoch, view, self.seed) for part in self._parts]
        return augmentation_draws.join(drawn, len(index))

    def apply(self, images: Tensor, draws: AugmentationDraws) -> Tensor:
        """uint8 (m, H, W, 3) on the policy's device -> a new tensor like it, or `images` itself if nothing changes.

        Raises ValueError for another number of draws than images.
        """
        if len(draws) != len(images):
            raise ValueError(f"{len(draws)} draws for {len(images)} images of shape {tuple(images.shape)}")
        if not draws.ops.any():
            return images
        if runs_triton(images):
            steps = to_device(plan(draws, images.shape[2], images.shape[1]), images.device)
            return image_ops(images, steps, FILL, blurs=self._three)
        return torch.from_numpy(cpu_ops.apply(images.numpy(), draws, FILL))


# Operations that are a special case of a kernel's: inverting is solarizing from 0 up, grayscale is color with factor 0.
_KERNEL = {"invert": "solarize", "grayscale": "color", **dict.fromkeys(WARPS, "affine")}
_CODE = np.array([CODES[_KERNEL.get(name, name)] for name in OPS])


def plan(draws: AugmentationDraws, width: int, height: int) -> np.ndarray:
    """The draws as `deitfast.kernels.image_ops` takes them: float64 (slots, m, 8), a sample's operations last.

    Raises ValueError for a blur that does not come to stand in the first slot.
    """
    m, slots = draws.ops.shape
    done = draws.ops != OP["none"]
    # A stable sort by "is something" moves each sample's operations, in their order, behind its empty slots.
    order = np.argsort(done, axis=1, kind="stable")
    ops, amounts, done = (np.take_along_axis(x, order, axis=1) for x in (draws.ops, draws.amounts, done))
    if (ops[:, 1:] == OP["blur"]).any():
        raise ValueError("blur must be the first of as many operations as there are slots")
    first = done & (np.cumsum(done, axis=1) == 1)
    rows = np.zeros((m, slots, COLUMNS))
    rows[:, :, 0] = np.where(done, _CODE[ops], CODES["skip"])
    rows[:, :, 1] = first
    kept = 256 - (1 << np.clip(8 - amounts.astype(np.int64), 0, 8))  # the bits that posterize keeps, as a mask
    rows[:, :, 2] = np.where(ops == OP["posterize"], kept, amounts)
    rows[~done.any(axis=1), -1, :2] = CODES["none"], 1
    for i, s in np.argwhere(np.isin(ops, [OP[name] for name in WARPS])).tolist():
        rows[i, s, 2:8] = augmentation_draws.affine_matrix(ops[i, s], float(amounts[i, s]), width, height)
    for i, s in np.argwhere(ops == OP["blur"]).tolist():
        rows[i, s, 2:5] = augmentation_draws.blur_taps(float(amounts[i, s]))
    return np.ascontiguousarray(rows.transpose(1, 0, 2))
