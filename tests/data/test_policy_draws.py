"""What the policy draws: levels equal to timm's, distributions equal to timm's and torchvision's, called many times.

Chi-square and Kolmogorov-Smirnov against samples of seeded references: the same p-values in every run.
"""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from deitfast.data import augmentation_draws
from deitfast.data.augmentation_draws import OP, OPS, RandAugment
from tests.augment_reference import TIMM_NAMES
from tests.reference import import_timm, import_torchvision

N = 100_000
LEAST = 0.001  # the smallest p-value that passes, of about a hundred
INDEX, VIEW = np.arange(N) // 3, np.arange(N) % 3
NOTATIONS = ["rand-m9-mstd0.5-inc1", "rand-m7-mstd2"]


@cache
def timm_draws(notation: str) -> tuple[np.ndarray, np.ndarray]:
    """Operations (N, 2) and amounts (N, 2) that timm's RandAugment gives its functions; posterize's images are black
    here, because what Pillow makes of them does not matter."""
    import_timm()
    from timm.data.auto_augment import rand_augment_transform

    transform = rand_augment_transform(notation, {"img_mean": (124, 116, 104)})
    assert len(transform.ops) == augmentation_draws.RANDAUGMENT_OPS
    seen: list[tuple[int, float]] = []
    ours = {timm: OP[name] for name, timm in TIMM_NAMES.items()}

    def record(op: int):
        return lambda image, *arguments, **_: seen.append((op, float(arguments[0]) if arguments else 0.0)) or image

    for op in transform.ops:
        op.aug_fn = record(ours[op.name.removesuffix("Increasing")])
    random.seed(5)
    np.random.seed(5)
    ops, amounts = np.zeros((N, 2), np.int64), np.zeros((N, 2))
    chosen = np.random.choice(len(transform.ops), (N, 2))  # as timm's __call__ draws, all views at once
    image = Image.new("RGB", (1, 1))
    for i, row in enumerate(chosen.tolist()):
        for slot, which in enumerate(row):
            seen.clear()
            transform.ops[which](image)
            if seen:
                ops[i, slot], amounts[i, slot] = seen[0]
    return ops, amounts


@cache
def our_draws(notation: str) -> augmentation_draws.AugmentationDraws:
    return RandAugment.parse(notation).draw(INDEX, 3, VIEW, seed=11)


def same_counts(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of two samples of small integers having one distribution."""
    counts = np.stack([np.bincount(x, minlength=int(max(a.max(), b.max())) + 1) for x in (a, b)])
    return stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue


@pytest.mark.parametrize("notation", NOTATIONS)
def test_operations_are_timms(notation):
    ours, (theirs, _) = our_draws(notation).ops, timm_draws(notation)
    for slot in range(2):
        assert same_counts(ours[:, slot], theirs[:, slot]) > LEAST
    pairs = 16 * ours[:, 0] + ours[:, 1]
    assert same_counts(pairs, 16 * theirs[:, 0] + theirs[:, 1]) > LEAST
    counts = np.bincount(pairs, minlength=256).reshape(16, 16)
    assert stats.chi2_contingency(counts).pvalue > LEAST, "the two slots depend on each other"
    assert abs((ours == OP["none"]).mean() - 0.5) < 0.005


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_amounts_are_timms(notation, name):
    draws, (ops, amounts) = our_draws(notation), timm_draws(notation)
    for slot in range(2):
        ours = draws.amounts[draws.ops[:, slot] == OP[name], slot]
        theirs = amounts[ops[:, slot] == OP[name], slot]
        if name in ("posterize", "solarize", "solarize add"):
            assert same_counts(ours.astype(int), theirs.astype(int)) > LEAST
        else:
            assert stats.ks_2samp(ours, theirs).pvalue > LEAST
        centre = 1.0 if name in ("color", "contrast", "brightness", "sharpness") else 0.0
        assert same_counts((ours > centre).astype(int), (theirs > centre).astype(int)) > LEAST


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_levels_are_timms_to_the_bit(name, increasing, monkeypatch):
    import_timm()
    from timm.data import auto_augment

    names = auto_augment._RAND_INCREASING_TRANSFORMS if increasing else auto_augment._RAND_TRANSFORMS
    level_of = auto_augment.LEVEL_TO_ARG[names[OP[name] - 1]]
    assert names[OP[name] - 1].removesuffix("Increasing") == TIMM_NAMES[name]
    magnitudes = np.concatenate([np.linspace(0, 10, 401), np.random.default_rng(0).uniform(0, 10, 200)])
    for sign in (1.0, -1.0):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v, sign=sign: sign * v)
        theirs = [level_of(m, {})[0] if level_of else 0.0 for m in magnitudes.tolist()]
        ours = augmentation_draws.level(np.full(len(magnitudes), OP[name]), magnitudes, np.array(sign), increasing)
        assert np.array_equal(ours, theirs)


def test_magnitudes_are_clipped_normals():
    draws = our_draws("rand-m9-mstd0.5-inc1")
    angles = np.abs(draws.amounts[draws.ops == OP["rotate"]]) / 3
    assert (angles <= 10).all()
    # 2.3 % of N(9, .5) lie above 10 and are cut there.
    assert abs((angles == 10).mean() - stats.norm.sf(2)) < 0.006
    assert stats.kstest(angles[angles < 10], stats.truncnorm(-18, 2, loc=9, scale=0.5).cdf).pvalue > LEAST


def test_notation():
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, True)
    assert RandAugment.parse("rand-m6") == RandAugment(6.0, 0.0, False)
    with pytest.raises(ValueError, match="'rand-n2' is not of the form"):
        RandAugment.parse("rand-n2")
    fixed = RandAugment(4.0, 0.0, True).draw(INDEX[:1000], 0, VIEW[:1000], 0)
    assert set(np.abs(fixed.amounts[fixed.ops == OP["rotate"]])) == {0.4 * 30.0}
    uniform = RandAugment(8.0, 101.0, True).draw(INDEX, 0, VIEW, 0)  # timm: above 100 stands for uniform
    turns = np.abs(uniform.amounts[uniform.ops == OP["rotate"]]) / 3
    assert stats.kstest(turns, stats.uniform(0, 8).cdf).pvalue > LEAST


def test_three_augment_draws_one_of_three():
    draws = augmentation_draws.three_augment(INDEX, 1, VIEW, seed=2)
    assert draws.ops.shape == (N, 1)
    counts = [(draws.ops == OP[name]).sum() for name in ("grayscale", "solarize", "blur")]
    assert sum(counts) == N
    assert stats.chisquare(counts).pvalue > LEAST
    sigma = draws.amounts[draws.ops == OP["blur"]]
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > LEAST
    assert (draws.amounts[draws.ops == OP["solarize"]] == 128).all()


@pytest.mark.parametrize("strength", [0.3, 1.5])
def test_color_jitter_is_torchvisions(strength):
    ColorJitter = import_torchvision().transforms.ColorJitter
    reference = ColorJitter(strength, strength, strength)
    torch.manual_seed(3)
    names = [OP["brightness"], OP["contrast"], OP["color"]]  # as torchvision numbers them
    orders, factors = [], []
    for _ in range(8000):
        order, *values, hue = reference.get_params(
            reference.brightness, reference.contrast, reference.saturation, reference.hue
        )
        assert hue is None
        orders.append([names[i] for i in order.tolist() if i < 3])
        factors.append(values)
    draws = augmentation_draws.color_jitter(strength, INDEX, 1, VIEW, seed=2)
    number = np.array([100, 10, 1])
    assert same_counts(draws.ops @ number, np.array(orders) @ number) > LEAST
    for i, name in enumerate(names):
        ours, theirs = draws.amounts[draws.ops == name], np.array(factors)[:, i]
        assert stats.ks_2samp(ours, theirs).pvalue > LEAST


def test_captions():
    draws = augmentation_draws.AugmentationDraws(
        np.array([[OP["rotate"], OP["posterize"]], [OP["none"], OP["equalize"]], [OP["none"], OP["none"]]]),
        np.array([[-12.34, 2.0], [0.0, 0.0], [0.0, 0.0]]),
    )
    assert draws.captions() == ["rotate -12.3, posterize 2", "equalize", "unchanged"]
    assert draws[1:].captions() == ["equalize", "unchanged"]


def test_wide_blurs_are_refused():
    with pytest.raises(ValueError, match="standard deviation 3 needs a radius"):
        augmentation_draws.blur_taps(3.0)


def test_names_fit_their_numbers():
    assert len(OPS) == len(OP)
    assert list(OPS[1 : augmentation_draws.RANDAUGMENT_OPS + 1]) == list(TIMM_NAMES)
