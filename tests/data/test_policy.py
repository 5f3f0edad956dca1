"""The policy as the loader calls it: a pure function of (seed, epoch, index, view), equal to PIL's images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from deitfast.data.augmentation import Augmentation, plan
from deitfast.data.augmentation_draws import OP, OPS, AugmentationDraws
from deitfast.recipe import Recipe
from tests import augment_reference
from tests.data.conftest import picture
from tests.kernels.conftest import CUDA, on_device
from tests.ptx.kernels import needs_engine

RECIPES = {
    "randaugment": Recipe(data="x"),
    "plain randaugment": Recipe(data="x", rand_augment="rand-m7", color_jitter=0.4),
    "three": Recipe(data="x", rand_augment="three", color_jitter=0.3),
    "three alone": Recipe(data="x", rand_augment="three"),
    "jitter": Recipe(data="x", rand_augment="none", color_jitter=0.8),
    "simple": Recipe(data="x", rand_augment="none"),
}
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("sm_90", marks=needs_engine), CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with on_device(request.param) as device:
        yield device


def views(count: int, size: int = 24) -> np.ndarray:
    return np.stack([np.asarray(picture(size, size, seed=i)) for i in range(count)])


@pytest.mark.parametrize("name", RECIPES)
def test_images_are_pils(name, device):
    policy = Augmentation(RECIPES[name], 24, device)
    m = 64
    index, view = np.arange(m) // 2, np.arange(m) % 2
    draws = policy.draw(index, 4, view)
    images = views(m)
    given = torch.from_numpy(images).to(device)
    out = policy.apply(given, draws)
    assert out.shape == given.shape
    assert out.dtype == torch.uint8
    assert np.array_equal(out.cpu().numpy(), augment_reference.apply(images, draws))
    assert np.array_equal(given.cpu().numpy(), images), "the input was written to"


@pytest.mark.parametrize("name", RECIPES)
def test_a_view_has_its_draws_in_any_batch(name):
    policy = Augmentation(RECIPES[name], 24, CPU)
    index, view = np.arange(300) % 50, np.arange(300) // 50 % 3
    whole = policy.draw(index, 2, view)
    shuffled = np.random.default_rng(0).permutation(300)
    again = Augmentation(RECIPES[name], 24, CPU).draw(index[shuffled], 2, view[shuffled])
    assert np.array_equal(again.ops, whole[shuffled].ops)
    assert np.array_equal(again.amounts, whole[shuffled].amounts)
    alone = policy.draw(index[7:8], 2, view[7:8])
    assert np.array_equal(alone.amounts, whole[7:8].amounts)
    if whole.ops.size:
        for changed in (policy.draw(index, 3, view), policy.draw(index, 2, view + 1),
                        Augmentation(replace(RECIPES[name], seed=1), 24, CPU).draw(index, 2, view)):  # fmt: skip
            assert not np.array_equal(changed.amounts, whole.amounts)


def test_images_do_not_depend_on_the_batch(device):
    policy = Augmentation(RECIPES["randaugment"], 24, device)
    index = np.arange(6)
    draws = policy.draw(index, 0, np.zeros(6, np.int64))
    images = torch.from_numpy(views(6)).to(device)
    whole = policy.apply(images, draws)
    assert torch.equal(policy.apply(images[2:5], draws[2:5]), whole[2:5])
    order = np.array([5, 0, 3, 1, 4, 2])
    assert torch.equal(policy.apply(images[order], draws[order]), whole[order])


def test_what_each_recipe_draws():
    drawn = {}
    for name, recipe in RECIPES.items():
        policy = Augmentation(recipe, 24, CPU)
        draws = policy.draw(np.arange(500), 0, np.zeros(500, np.int64))
        drawn[name] = [{OPS[op] for op in slot} for slot in draws.ops.T]
        assert policy.active == (name != "simple")
    jittered = {"brightness", "contrast", "color"}
    assert drawn["randaugment"] == [set(OPS[:16])] * 2
    assert drawn["plain randaugment"] == [set(OPS[:16])] * 2, "auto-augment switches colour jitter off"
    assert drawn["three"] == [{"grayscale", "solarize", "blur"}, *[jittered] * 3]
    assert drawn["three alone"] == [{"grayscale", "solarize", "blur"}]
    assert drawn["jitter"] == [jittered] * 3
    assert drawn["simple"] == []


def test_misuse_is_an_error():
    policy = Augmentation(RECIPES["randaugment"], 24, CPU)
    draws = policy.draw(np.arange(3), 0, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="3 draws for 2 images"):
        policy.apply(torch.from_numpy(views(2)), draws)
    with pytest.raises(ValueError, match="blur must be the first"):
        plan(AugmentationDraws(np.array([[OP["color"], OP["blur"]]]), np.array([[1.0, 1.0]])), 24, 24)
