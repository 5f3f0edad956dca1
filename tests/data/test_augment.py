"""The device stage against timm's formulas, given the same random parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from deitfast.data import IMAGENET_MEAN, IMAGENET_STD, Batch, Targets, normalise, prepare
from deitfast.data.batch import prepare_patches
from deitfast.kernels.common import INTERPRETED
from deitfast.recipe import Recipe
from tests.reference import dense

M, SIZE = 16, 24
RECIPE = replace(Recipe(), seed=5, smoothing=0.1)


def make_batch(erase: torch.Tensor | None = None, epoch: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (M, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, 7, (M,), generator=generator),
        index=torch.arange(M) + 100,
        view=torch.arange(M) % 3,
        epoch=torch.tensor([epoch]),
        erase=torch.zeros(M, 4, dtype=torch.int64) if erase is None else erase,
        lam=torch.ones(M),
        mix_box=torch.zeros(M, 4, dtype=torch.int64),
        step=0,
        slots=np.arange(M),
    )


def by_pairs(mixed_by_flip: torch.Tensor) -> torch.Tensor:
    """timm pairs row i with row m - 1 - i; rows in that order become neighbours."""
    half = len(mixed_by_flip) // 2
    return torch.stack([mixed_by_flip[:half], mixed_by_flip.flip(0)[:half]], dim=1).flatten(0, 1)


def from_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[0::2], x[1::2].flip(0)])


def test_normalise_is_torchvisions_formula():
    images = make_batch().images
    exact = images.double().permute(0, 3, 1, 2) / 255
    exact = (exact - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    result = normalise(images)
    assert result.is_contiguous()
    assert torch.allclose(result.double(), exact, atol=1e-6)
    assert normalise(images, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("cutmix", [False, True])
def test_mixing_is_timms(timm, monkeypatch, cutmix):
    from timm.data.mixup import Mixup

    lam, (top, left, height, width) = (0.3, (0, 0, 0, 0)) if not cutmix else (1 - 9 * 14 / SIZE**2, (3, 10, 9, 14))
    batch = make_batch()
    x = normalise(batch.images)
    mixer = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=7)
    monkeypatch.setattr(mixer, "_params_per_batch", lambda: (lam, cutmix))
    box = (top, top + height, left, left + width)
    monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, **__: (box, lam))
    expected, expected_targets = mixer(from_pairs(x).clone(), from_pairs(batch.labels))

    batch.lam, batch.mix_box = torch.full((M,), lam), torch.tensor([[top, left, height, width]]).repeat(M, 1)
    images, targets = prepare(batch, RECIPE)
    assert torch.allclose(images, by_pairs(expected), atol=1e-6)
    assert torch.allclose(dense(targets, 7), by_pairs(expected_targets), atol=1e-6)


def test_dense_targets_are_timms(timm):
    from timm.data.mixup import mixup_target

    labels = torch.tensor([0, 3, 3, 1])  # flipping pairs 0 with 3, 1 with 2: equal labels as well
    for lam, smoothing in ((0.7, 0.1), (1.0, 0.0), (0.0, 0.3)):
        expected = mixup_target(labels, 5, lam, smoothing)
        ours = dense(Targets(labels, labels.flip(0), torch.full((4,), lam), smoothing), 5)
        assert torch.allclose(ours, expected, atol=1e-6)
        assert torch.allclose(ours.sum(1), torch.ones(4))


def test_erasing_fills_exactly_the_rectangle_with_noise():
    boxes = torch.zeros(M, 4, dtype=torch.int64)
    boxes[1] = torch.tensor([2, 3, 10, 20])
    boxes[4] = torch.tensor([0, 0, 23, 23])
    boxes[5] = torch.tensor([23, 22, 1, 1])
    batch, plain = make_batch(boxes), replace(RECIPE, mixup=0.0, cutmix=0.0)
    batch.images.fill_(255)
    white = normalise(batch.images[:1])[0, :, :1, :1]
    x, _ = prepare(batch, plain)
    erased = torch.zeros(M, SIZE, SIZE, dtype=torch.bool)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        erased[i, top : top + height, left : left + width] = True
    assert torch.equal((x - white).abs().amax(1) > 1e-5, erased)
    assert x.abs().amax() < 10
    noise = x.permute(0, 2, 3, 1)[erased].flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 0.01
    red, green, blue = (x[4, c, :23, :23].flatten().numpy() for c in range(3))
    assert max(abs(np.corrcoef(a, b)[0, 1]) for a, b in ((red, green), (red, blue), (green, blue))) < 0.15


def test_noise_belongs_to_the_sample_not_to_its_row():
    boxes, plain = torch.tensor([[2, 3, 10, 12]]).repeat(M, 1), replace(RECIPE, mixup=0.0, cutmix=0.0)
    whole, _ = prepare(make_batch(boxes), plain)
    batch = make_batch(boxes)
    rows = [9, 2, 5]
    batch.images, batch.index, batch.view = batch.images[rows], batch.index[rows], batch.view[rows]
    batch.erase, batch.mix_box, batch.lam = batch.erase[rows], batch.mix_box[rows], batch.lam[rows]
    assert torch.equal(prepare(batch, plain)[0], whole[rows])
    for other in (prepare(make_batch(boxes), replace(plain, seed=6)), prepare(make_batch(boxes, epoch=3), plain)):
        assert not torch.equal(other[0], whole)


def mixed_batch() -> Batch:
    """Erased rows beside whole ones, a pair of mixup, one of cutmix, pairs with neither."""
    boxes = torch.zeros(M, 4, dtype=torch.int64)
    boxes[1] = torch.tensor([2, 3, 10, 20])
    boxes[4] = torch.tensor([0, 0, 23, 23])
    boxes[7] = torch.tensor([23, 22, 1, 1])
    batch = make_batch(boxes)
    batch.lam[0:2], batch.mix_box[4:6] = 0.3, torch.tensor([3, 10, 9, 14])
    return batch


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("patch", [4, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_the_unfolded_images(patch, mixes, dtype):
    """On CPU to the bit; in the interpreter the noise is computed in fp32 too, and bf16 is cut, not rounded."""
    batch, recipe = mixed_batch(), RECIPE if mixes else replace(RECIPE, mixup=0.0, cutmix=0.0)
    images, soft = prepare(batch, recipe)
    expected = F.unfold(images, patch, stride=patch).transpose(1, 2).to(dtype)
    patches = prepare_patches(batch, recipe, patch, dtype)
    assert patches.dtype == dtype
    if INTERPRETED:
        torch.testing.assert_close(patches, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    else:
        assert torch.equal(patches, expected)
    assert torch.equal(soft.partner_labels, batch.labels[torch.arange(M) ^ 1] if mixes else batch.labels)


def test_patches_and_weight_are_the_patch_convolution():
    images, _ = prepare(mixed_batch(), RECIPE)
    conv = torch.nn.Conv2d(3, 10, kernel_size=8, stride=8)
    rows = F.linear(prepare_patches(mixed_batch(), RECIPE, 8), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(rows, conv(images).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
