"""The distributions of the draws against timm's own code, called many times."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from deitfast.data import draws
from tests.reference import import_torchvision

N = 4000
INDEX = np.arange(N)
VIEW = np.zeros(N, np.int64)


def same_distribution(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return stats.ks_2samp(ours, theirs).pvalue > 0.005


@pytest.mark.parametrize(("width", "height"), [(500, 375), (60, 400), (1, 1)])
def test_crop_is_torchvisions(width, height):
    # timm's is the same but for a pixel-sized image, of which it may take an empty crop.
    RandomResizedCrop = import_torchvision().transforms.RandomResizedCrop
    ours = draws.random_resized_crop(np.full(N, width), np.full(N, height), INDEX, 0, VIEW, seed=1)
    torch.manual_seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(N)])
    top, left, h, w = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h > 0).all()
    assert (w > 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert all(same_distribution(ours[:, i], theirs[:, i]) for i in range(4))
    assert same_distribution(h * w, theirs[:, 2] * theirs[:, 3])


def test_crop_falls_back_to_the_largest_central_one():
    # No crop of all the area with a ratio near 1 fits into such a strip, so each of the ten tries fails.
    box = draws.random_resized_crop(
        np.array([1000, 10]), np.array([10, 1000]), np.arange(2), 0, np.zeros(2, int), 0, (1, 1)
    )
    assert box.tolist() == [[0, 493, 10, 13], [493, 0, 13, 10]]


def test_flip_has_its_probability():
    for p in (0.0, 0.3, 1.0):
        assert abs(draws.flip(INDEX, 0, VIEW, 1, p).mean() - p) < 0.03


def test_erasing_is_timms(timm):
    from timm.data.random_erasing import RandomErasing

    ours = draws.random_erasing(64, INDEX, 0, VIEW, seed=2, probability=0.25)
    random.seed(1)
    torch.manual_seed(1)
    eraser = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = []
    for _ in range(N):
        hit = eraser(torch.full((1, 64, 64), 9.0))[0] != 9.0
        rows, columns = hit.any(1).nonzero(), hit.any(0).nonzero()
        theirs.append([0] * 4 if not len(rows) else [int(rows[0]), int(columns[0]), len(rows), len(columns)])
    theirs = np.array(theirs)
    done, timm_done = ours[:, 2] > 0, theirs[:, 2] > 0
    assert abs(done.mean() - timm_done.mean()) < 0.03
    assert all(same_distribution(ours[done, i], theirs[timm_done, i]) for i in range(4))
    assert (ours[:, 0] + ours[:, 2] <= 64).all()
    assert (ours[:, 1] + ours[:, 3] <= 64).all()


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 5.0])
def test_beta_is_beta(alpha):
    assert stats.kstest(draws.beta(alpha, np.arange(20_000), 3, seed=4), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_mix_is_timms(timm):
    from timm.data.mixup import Mixup, cutmix_bbox_and_lam

    lam, box = draws.mix(64, N, step=5, seed=6, mixup=0.8, cutmix=1.0, probability=0.9, switch=0.4)
    np.random.seed(0)
    mixer = Mixup(0.8, 1.0, prob=0.9, switch_prob=0.4)
    timm_lam, timm_box = np.ones(N), np.zeros((N, 4), int)
    for i in range(N):
        timm_lam[i], cut = mixer._params_per_batch()
        if cut:
            (yl, yh, xl, xh), timm_lam[i] = cutmix_bbox_and_lam((64, 64), timm_lam[i])
            timm_box[i] = yl, xl, yh - yl, xh - xl
    cut, timm_cut = box[:, 2] * box[:, 3] > 0, timm_box[:, 2] * timm_box[:, 3] > 0
    assert abs(cut.mean() - timm_cut.mean()) < 0.03
    assert abs((lam == 1).mean() - (timm_lam == 1).mean()) < 0.03
    assert same_distribution(lam[~cut & (lam < 1)], timm_lam[~timm_cut & (timm_lam < 1)])
    assert same_distribution(lam[cut], timm_lam[timm_cut])
    assert all(same_distribution(box[cut, i], timm_box[timm_cut, i]) for i in range(4))
    assert np.allclose(lam[cut], 1 - box[cut, 2] * box[cut, 3] / 64**2)


def test_mix_with_one_or_none_of_the_two():
    lam, box = draws.mix(64, 50, 0, 0, mixup=0.8, cutmix=0)
    assert (lam < 1).all()
    assert not box.any()
    lam, box = draws.mix(64, 50, 0, 0, mixup=0, cutmix=1.0)
    assert np.allclose(lam, 1 - box[:, 2] * box[:, 3] / 64**2)
    assert box.any()
    lam, box = draws.mix(64, 50, 0, 0, mixup=0, cutmix=0)
    assert (lam == 1).all()
    assert not box.any()
