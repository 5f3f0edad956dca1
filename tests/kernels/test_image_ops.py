"""The image operations against timm's and torchvision's functions on PIL images: equal in every bit.

Eager on the CPU, the Triton kernels in the interpreter and on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deitfast.data.augmentation import plan
from deitfast.data.augmentation_draws import OP, OPS, AugmentationDraws, affine_matrix, level
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.image_ops import CODES, image_ops
from tests.augment_reference import FILL, apply
from tests.data.conftest import picture

MAGNITUDES = (0.0, 3.3, 9.0, 10.0)


def pictures(height: int, width: int) -> np.ndarray:
    """A smooth colour image, a gray one, noise in a few dark values, and one colour: uint8 (4, H, W, 3)."""
    rng = np.random.default_rng(height * width)
    colour = np.asarray(picture(width, height, seed=1))
    gray = np.repeat(np.asarray(picture(width, height, seed=2))[..., :1], 3, axis=-1)
    dark = rng.integers(20, 31, colour.shape).astype(np.uint8)
    return np.stack([colour, gray, dark, np.full_like(colour, (0, 128, 255))])


def amounts(op: int, count: int, seed: int = 0) -> np.ndarray:
    """Amounts of an operation over the magnitude range, both signs, RandAugment's levels with and without "inc1"."""
    rng = np.random.default_rng(seed + op)
    if OPS[op] == "blur":
        return rng.uniform(0.1, 2.0, count)
    magnitude = np.resize([*MAGNITUDES, *rng.uniform(0, 10, 8)], count)
    both = [level(np.full(count, op), magnitude, rng.choice([-1.0, 1.0], count), inc) for inc in (True, False)]
    return np.where(np.arange(count) % 3 == 2, both[1], both[0])


def run(images: np.ndarray, draws: AugmentationDraws, device: torch.device) -> np.ndarray:
    steps = torch.from_numpy(plan(draws, images.shape[2], images.shape[1])).to(device)
    given = torch.from_numpy(images).to(device)
    out = image_ops(given, steps, FILL, blurs=bool((draws.ops == OP["blur"]).any()))
    assert torch.equal(given.cpu(), torch.from_numpy(images)), "the input was written to"
    return out.cpu().numpy()


@pytest.mark.parametrize("name", OPS[1:])
@pytest.mark.parametrize("size", [(19, 30), (1, 1), (2, 5)], ids=str)
def test_every_operation_is_pils(name, size, device):
    images = np.tile(pictures(*size), (1 if INTERPRETED or size == (1, 1) else 6, 1, 1, 1))
    draws = AugmentationDraws(np.full((len(images), 1), OP[name]), amounts(OP[name], len(images))[:, None])
    assert np.array_equal(run(images, draws, device), apply(images, draws))


def test_operations_follow_one_another(device):
    images = np.concatenate([pictures(21, 16), pictures(21, 16)])
    names = [
        ("none", "none", "none", "none"),
        ("none", "equalize", "none", "none"),
        ("rotate", "none", "none", "autocontrast"),
        ("shear x", "contrast", "sharpness", "none"),
        ("blur", "brightness", "contrast", "color"),
        ("blur", "translate y", "rotate", "equalize"),
        ("solarize", "color", "brightness", "contrast"),
        ("none", "none", "none", "invert"),
    ]
    ops = np.array([[OP[name] for name in row] for row in names])
    values = np.array([[amounts(op, 3, seed=i)[1] for op in row] for i, row in enumerate(ops)])
    draws = AugmentationDraws(ops, np.where(ops == OP["none"], 0.0, values))
    assert np.array_equal(run(images, draws, device), apply(images, draws))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_any_number_of_slots(slots, device):
    images = pictures(9, 9)
    ops = np.array([[OP["invert"]] * slots, [OP["none"]] * slots, [OP["brightness"]] * slots, [OP["rotate"]] * slots])
    draws = AugmentationDraws(ops, np.array([[0.0] * slots, [0.0] * slots, [0.7] * slots, [30.0] * slots]))
    assert np.array_equal(run(images, draws, device), apply(images, draws))


def test_affine_matrix_of_other_sizes():
    # A turn about the centre leaves the centre where it is, also where height and width differ.
    for width, height in ((10, 20), (7, 3)):
        a, b, c, d, e, f = affine_matrix(OP["rotate"], 20.0, width, height)
        assert a * width / 2 + b * height / 2 + c == pytest.approx(width / 2)
        assert d * width / 2 + e * height / 2 + f == pytest.approx(height / 2)


def test_misuse_is_an_error():
    images, steps = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 2, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"float32 and plan torch\.float64"):
        image_ops(images.float(), steps, FILL)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\)"):
        image_ops(images.permute(0, 3, 1, 2), steps, FILL)
    with pytest.raises(ValueError, match=r"plan has shape \(1, 2, 8\), expected \(1, 3, 8\)"):
        image_ops(torch.cat([images, images[:1]]), steps, FILL)
    with pytest.raises(ValueError, match="no slots"):
        image_ops(images, steps[:0], FILL)


def test_empty_batch(device):
    empty = torch.zeros(0, 4, 4, 3, dtype=torch.uint8, device=device)
    assert image_ops(empty, torch.zeros(2, 0, 8, dtype=torch.float64, device=device), FILL).shape == (0, 4, 4, 3)


def test_opcheck(device):
    images = torch.from_numpy(pictures(6, 7)).to(device)
    steps = torch.zeros(1, 4, 8, dtype=torch.float64, device=device)
    steps[..., 0], steps[..., 1], steps[..., 2] = CODES["brightness"], 1, 0.5
    torch.library.opcheck(torch.ops.deitfast.image_ops.default, (images, steps, list(FILL), False))
