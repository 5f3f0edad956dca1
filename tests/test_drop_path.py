"""Drop-path: both forms keep the expectation, and the draws depend on (seed, step, slot) alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deitfast.engine.drop_path import DropPath
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT, Subset
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe

GROUP = 32


def recipe_of(form: str) -> Recipe:
    return replace(Recipe(), drop_path=0.5, drop_path_form=form, mix_group=GROUP, drop_path_schedule="constant")


def model_of(recipe: Recipe) -> DeiT:
    constant = recipe.drop_path_schedule == "constant"
    return create_model(
        "deit_digits_patch4_16", num_classes=10, drop_path=recipe.drop_path, constant_drop_path=constant
    )


def batch_of(step: int, slots: np.ndarray) -> Any:
    class Slots:
        images = torch.zeros(len(slots), 1)

    Slots.step, Slots.slots = step, slots  # type: ignore[attr-defined]
    return Slots


def factors(drop_path: DropPath, step: int, slots: np.ndarray) -> torch.Tensor:
    """The factor of every branch and image: (depth, 2, m)."""
    arranged = drop_path.arrange(drop_path.draw(batch_of(step, slots)))
    if isinstance(arranged, torch.Tensor):
        return arranged
    assert arranged is not None
    rows = []
    for subset in arranged:
        row = torch.ones(2, len(slots))
        if subset is not None:
            row = torch.zeros(2, len(slots)).scatter(1, subset.index_2K, subset.scale)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["bernoulli", "subset"])
def test_both_forms_have_the_same_mean_and_chance(form: str) -> None:
    drop_path = DropPath(model_of(recipe_of(form)), recipe_of(form), 4 * GROUP)
    draws = torch.stack([factors(drop_path, step, np.arange(4 * GROUP)) for step in range(200)])
    subset = (draws > 0).double().mean((0, 3))
    # 25,600 draws each: five standard deviations of a Bernoulli mean.
    assert (subset - 0.5).abs().max() < 5 * (0.25 / draws[:, 0, 0].numel()) ** 0.5
    assert set(draws.unique().tolist()) == {0.0, 2.0}
    assert (draws.double().mean((0, 3)) - 1).abs().max() < 10 * (0.25 / draws[:, 0, 0].numel()) ** 0.5
    by_slot = (draws > 0).double().mean((0, 1, 2))  # no slot is favoured: 1,600 draws each
    assert (by_slot - 0.5).abs().max() < 5 * (0.25 / 1600) ** 0.5


def test_a_subset_has_its_size_in_every_group_and_is_skipped_where_nothing_drops() -> None:
    recipe = replace(recipe_of("subset"), drop_path_schedule="linear")
    drop_path = DropPath(model_of(recipe), recipe, 2 * GROUP)
    values = factors(drop_path, 3, np.arange(2 * GROUP))
    counts = (values > 0).view(4, 2, 2, GROUP).sum(-1)
    assert counts[:, 0, 0].tolist() == [32, 27, 21, 16]
    assert (counts == counts[:, :1, :1]).all()
    arranged = drop_path.arrange(drop_path.draw(batch_of(3, np.arange(2 * GROUP))))
    assert arranged is not None
    assert arranged[0] is None


@pytest.mark.parametrize("form", ["bernoulli", "subset"])
def test_draws_do_not_depend_on_how_the_batch_is_cut(form: str) -> None:
    drop_path = DropPath(model_of(recipe_of(form)), recipe_of(form), GROUP)
    whole = factors(drop_path, 7, np.arange(4 * GROUP))
    parts = [factors(drop_path, 7, np.arange(i * GROUP, (i + 1) * GROUP)) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts, -1))
    assert not torch.equal(whole, factors(drop_path, 8, np.arange(4 * GROUP)))


def test_a_model_skips_what_it_would_multiply_by_zero() -> None:
    """The same factors as scales and as a subset give the same outputs and gradients."""
    recipe = recipe_of("subset")
    model = model_of(recipe).double().train()
    drop_path = DropPath(model, recipe, GROUP)
    batch = batch_of(0, np.arange(GROUP))
    arranged = drop_path.arrange(drop_path.draw(batch))
    assert arranged is not None
    assert isinstance(arranged[0], Subset)
    images = torch.randn(GROUP, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for drop in (arranged, factors(drop_path, 0, np.arange(GROUP))):
        model.zero_grad()
        logits = model(images, drop)
        logits.square().sum().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)  # the scales are fp32


def test_a_micro_batch_that_cuts_a_group_is_refused() -> None:
    with pytest.raises(DeitfastError, match="draws in mix groups of 32, but a process runs 16 images at once"):
        DropPath(model_of(recipe_of("subset")), recipe_of("subset"), 16)
