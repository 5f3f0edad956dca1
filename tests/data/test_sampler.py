"""The order of images: the original's repeated augmentation, and slots that any number of processes share."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from deitfast.data.sampler import Order, permutation, slot_order
from deitfast.errors import DeitfastError


def original_sampler(order: np.ndarray, world: int, rank: int) -> np.ndarray:
    """Repeated augmentation as DeiT's samplers.py defines it, with the permutation given."""
    n = len(order)
    repeated = np.repeat(order, 3)
    total = -(-3 * n // world) * world
    padded = np.concatenate([repeated, repeated[: total - 3 * n]])
    return padded[rank:total:world][: n // 256 * 256 // world]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("n", "batch"), [(1437, 64), (1024, 256), (777, 96)])
def test_repeated_augmentation_shows_what_the_original_does(n, batch, world):
    plan = Order(n, batch, repeats=3, seed=11)
    order = permutation(n, 11, 0)
    ranks = [original_sampler(order, world, r) for r in range(world)]
    per_rank = batch // world
    assert plan.steps_per_epoch == len(ranks[0]) // per_rank
    for step in range(plan.steps_per_epoch):
        index, view, epoch = plan.slots(step)
        theirs = np.concatenate([r[step * per_rank : (step + 1) * per_rank] for r in ranks])
        assert Counter(index.tolist()) == Counter(theirs.tolist())
        assert len(set(zip(index.tolist(), view.tolist(), strict=True))) == batch  # no view twice
        assert epoch == 0


def test_without_repeats_every_image_once_an_epoch_and_epochs_differ():
    plan = Order(60, 20, seed=1)
    epochs = [np.concatenate([plan.slots(3 * e + s)[0] for s in range(3)]) for e in range(2)]
    assert all(sorted(e.tolist()) == list(range(60)) for e in epochs)
    assert not np.array_equal(*epochs)
    assert plan.slots(3)[2] == 1
    assert not np.array_equal(epochs[0], Order(60, 20, seed=2).slots(0)[0])


def test_permutation_is_uniform():
    # The place of image 0 over many seeds, against the uniform distribution.
    places = [int(np.flatnonzero(permutation(8, seed, 0) == 0)[0]) for seed in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 24.3  # chi-square, 7 degrees of freedom, p = .001


@pytest.mark.parametrize(("batch", "group"), [(256, 128), (96, 128), (200, 128), (7, 4)])
def test_slots_are_pair_major_inside_mix_groups(batch, group):
    order = slot_order(batch, group)
    assert sorted(order.tolist()) == list(range(batch))
    for start in range(0, batch, group):
        size = min(group, batch - start)
        inside = order[start : start + size]
        assert inside.min() == start  # a group's slots hold the group's entries
        pairs = inside[: size // 2 * 2].reshape(-1, 2)
        assert (pairs[:, 1] - pairs[:, 0] == size // 2).all()


def test_copies_of_an_image_are_never_a_pair():
    plan = Order(1000, 256, repeats=3)
    for step in range(plan.steps_per_epoch):
        index = plan.slots(step)[0].reshape(-1, 2)
        assert (index[:, 0] != index[:, 1]).all()


def test_counts():
    imagenet = Order(1_281_167, 1024, repeats=3)
    assert imagenet.steps_per_epoch == 1_281_024 // 1024
    assert imagenet.distinct_per_epoch == 427_008
    assert Order(100, 50, repeats=3).steps_per_epoch == 2  # fewer than 256 images are not cut


def test_too_few_images_for_a_batch():
    with pytest.raises(DeitfastError, match=r"40 training images do not fill one batch of 64\. Use --batch 40 or less"):
        Order(40, 64)
    with pytest.raises(DeitfastError, match="mix group 3 must be even"):
        Order(40, 4, mix_group=3)


@pytest.mark.parametrize("repeats", [1, 3])
def test_balanced_epochs_show_every_class_equally_often_and_no_view_twice(repeats):
    labels = np.repeat([0, 1, 3], [300, 40, 5])  # and none of class 2
    plan = Order(len(labels), 32, repeats, seed=4, labels=labels)
    plain = Order(len(labels), 32, repeats, seed=4)
    assert plan.steps_per_epoch == plain.steps_per_epoch
    seen = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        index, view = (np.concatenate([plan.slots(s)[i] for s in steps]) for i in (0, 1))
        pairs = list(zip(index.tolist(), view.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        entries = Counter(index[view % repeats == 0].tolist())
        shown = np.bincount(labels[index[view % repeats == 0]], minlength=4)
        assert shown[2] == 0
        assert np.ptp(shown[[0, 1, 3]]) <= 1 + (repeats > 1)  # a last entry may be cut before its copies
        for c in (1, 3):  # of a class that comes again, each image as often as any other, give or take once
            times = [entries[i] for i in np.flatnonzero(labels == c).tolist()]
            assert max(times) - min(times) <= 1 + (repeats > 1)
        assert max(entries[i] for i in range(300)) == 1
        if repeats == 3:  # the copies of an entry stand in a row, as without
            whole = [i for i, n in Counter((i, v // 3) for i, v in pairs).items() if n == 3]
            assert len(whole) >= len(pairs) // 3 - 1
        seen.append(set(index[labels[index] == 0].tolist()))
    assert seen[0] != seen[1]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(plan.slots(7), Order(len(labels), 32, repeats, 4, labels=labels).slots(7), strict=True)
    )


def test_balanced_order_is_not_sorted_by_class():
    labels = np.repeat([0, 1], [500, 20])
    index, _, _ = Order(520, 128, labels=labels).slots(0)
    runs = (np.diff(labels[index]) != 0).sum()
    assert 40 < runs < 88  # 64 expected of fair coins, standard deviation 5.6
