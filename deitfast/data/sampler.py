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

**Balanced.** With `labels` the entries of an epoch are not a permutation of the images: every class has as many (give
or take one, in turn from epoch to epoch), its images in permuted order, each as often as the others. An image whose
class is short of them comes again as a new entry with views of its own: those of its k-th time are numbers k * repeats
to k * repeats + repeats - 1. An epoch is as long as without.

A process takes a stretch of slots, so any number of processes and any even micro-batch compute the same global batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from deitfast.data.philox import ORDER, counter, philox4x32
from deitfast.errors import DeitfastError

if TYPE_CHECKING:
    from deitfast.recipe import Recipe


_SHUFFLE = 0x5EED  # another seed than that of the permutation inside the classes


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


def balanced(labels: np.ndarray, count: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, equally many of every class that has any: their numbers and how often each came before, (count,).

    labels: int64 (n,).
    """
    by_class = permutation(len(labels), seed, epoch)
    by_class = by_class[np.argsort(labels[by_class], kind="stable")]
    _, first, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    classes = len(sizes)
    place = np.arange(count, dtype=np.int64)
    of_class, turn = (place + epoch * count) % classes, place // classes  # whose turn it is goes on over the epochs
    images = by_class[first[of_class] + turn % sizes[of_class]]
    mixed = permutation(count, seed ^ _SHUFFLE, epoch)
    return images[mixed], (turn // sizes[of_class])[mixed]


@dataclass(frozen=True)
class Order:
    """The order of a training run over `n` images in global batches of `batch` slots.

    repeats: copies of an image in a row (1: none; DeiT uses 3). mix_group: entries that share one mixup lambda, even.
    labels: int64 (n,), where the classes are to come equally often. Raises DeitfastError if an epoch would hold no
    batch.
    """

    n: int
    batch: int
    repeats: int = 1
    seed: int = 0
    mix_group: int = 128
    labels: np.ndarray | None = field(default=None, compare=False, repr=False)
    _epochs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, compare=False, repr=False)

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
    def of(cls, labels: np.ndarray, recipe: Recipe) -> Order:
        """The order of a recipe's run over images with these labels, int64 (n,)."""
        balances = recipe.class_weights == "sampled"
        return cls(
            len(labels), recipe.batch, recipe.repeats, recipe.seed, recipe.mix_group, labels if balances else None
        )

    @property
    def _length(self) -> int:
        """Entries of an epoch before the last partial batch is dropped."""
        return self.n if self.repeats == 1 or self.n < 256 else self.n // 256 * 256

    @property
    def steps_per_epoch(self) -> int:
        return self._length // self.batch

    @property
    def distinct_per_epoch(self) -> int:
        """Number of different images in an epoch; where classes are balanced, of entries, some of the same image."""
        return -(-self.steps_per_epoch * self.batch // self.repeats)

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The global batch of a step in slot order: image index int64 (batch,), view int64 (batch,), epoch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        entry = step_in_epoch * self.batch + slot_order(self.batch, self.mix_group)
        place, view = entry // self.repeats, entry % self.repeats
        if self.labels is None:
            return permutation(self.n, self.seed, epoch)[place], view, epoch
        images, times = self._balanced(epoch)
        return images[place], times[place] * self.repeats + view, epoch

    def _balanced(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """`balanced` of an epoch, kept for the steps that follow; the reader is ahead, over the border of two."""
        assert self.labels is not None
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = balanced(self.labels, self.distinct_per_epoch, self.seed, epoch)
        return self._epochs[epoch]
