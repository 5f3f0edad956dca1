"""Which image, in which view, fills which slot of which step: a pure function of (seed, step).

**Order.** An epoch is a permutation of the images: a stable sort by Philox words. With repeated augmentation
(Hoffer et al. 2019, as DeiT's sampler does it) every image of the permutation stands `repeats` times in a row, and the
sequence is cut to floor(n / 256) * 256 entries (n when n < 256), so an epoch is about as long as without
repetition but shows a third of the images. Global batch s is the s-th stretch of `batch` entries, which is the
union over ranks of what the original's strided sampler hands out; a last partial batch is dropped. The copies
of an image are its views 0, 1, 2.

**Slots.** Mixup and cutmix mix pairs. The original pairs by flipping a process's batch, so a pair depends on the number
of processes. Here the global batch is cut into mix groups of `mix_group` consecutive entries (one lambda each), and in
a group of g entries, entry i is paired with entry i + g/2: as random as the flip, the order being a permutation, and
the copies of one image are never mixed with each other (for g >= 2 * repeats). Slots are pair-major: entries
0, g/2, 1, 1 + g/2, ... So the partner of slot s is s xor 1; any even stretch of slots holds whole pairs; and most
copies of an image lie in one stretch, where it is decoded once.

A process takes a stretch of slots, so any number of processes and any even micro-batch compute the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from deitfast.data.philox import ORDER, counter, philox4x32
from deitfast.errors import DeitfastError

if TYPE_CHECKING:
    from deitfast.recipe import Recipe


@lru_cache(maxsize=2)  # a loader reads ahead across the border of two epochs
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(n) as read-only int64 (n,), the same on every machine and numpy version."""
    index = np.arange(n, dtype=np.int64)
    zero = np.zeros(1, np.int64)
    high, low, _, _ = philox4x32(index, zero + epoch, zero, zero + counter(ORDER), seed)
    order = np.argsort(high << 31 | low >> 1, kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=4)
def slot_order(batch: int, mix_group: int) -> np.ndarray:
    """Position inside the global batch of every slot: int64 (batch,), pair-major inside each mix group."""
    groups = []
    for start in range(0, batch, mix_group):
        size = min(mix_group, batch - start)
        half = size // 2
        pairs = np.stack([np.arange(half), np.arange(half) + half], axis=1).reshape(-1)
        groups.append(start + np.concatenate([pairs, np.arange(2 * half, size)]))
    order = np.concatenate(groups).astype(np.int64)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Order:
    """The order of a training run over `n` images in global batches of `batch` slots.

    repeats: copies of an image in a row (1: none; DeiT uses 3). mix_group: entries that share one mixup lambda, even.
    Raises DeitfastError if an epoch would hold no batch.
    """

    n: int
    batch: int
    repeats: int = 1
    seed: int = 0
    mix_group: int = 128

    def __post_init__(self) -> None:
        if self.batch < 1 or self.repeats < 1:
            raise DeitfastError(f"batch {self.batch} and repeats {self.repeats} must be at least 1")
        if self.mix_group < 2 or self.mix_group % 2:
            raise DeitfastError(f"mix group {self.mix_group} must be even and at least 2: mixup pairs images")
        if self.steps_per_epoch == 0:
            raise DeitfastError(
                f"{self.n} training images do not fill one batch of {self.batch}. "
                f"Use --batch {max(self._length // 2 * 2, 2)} or less, or more images"
            )

    @classmethod
    def of(cls, images: int, recipe: Recipe) -> Order:
        """The order of a recipe's run over so many images."""
        return cls(images, recipe.batch, recipe.repeats, recipe.seed, recipe.mix_group)

    @property
    def _length(self) -> int:
        """Entries of an epoch before the last partial batch is dropped."""
        return self.n if self.repeats == 1 or self.n < 256 else self.n // 256 * 256

    @property
    def steps_per_epoch(self) -> int:
        return self._length // self.batch

    @property
    def distinct_per_epoch(self) -> int:
        """Number of different images in an epoch."""
        return -(-self.steps_per_epoch * self.batch // self.repeats)

    def epoch(self, step: int) -> int:
        """Epoch of a global step, counted from 0 over the whole run."""
        return step // self.steps_per_epoch

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The global batch of a step in slot order: image index int64 (batch,), view int64 (batch,), epoch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        entry = step_in_epoch * self.batch + slot_order(self.batch, self.mix_group)
        return permutation(self.n, self.seed, epoch)[entry // self.repeats], entry % self.repeats, epoch
