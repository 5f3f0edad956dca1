"""The learning rate against the paper's formula, the groups against timm's rule, EMA and optimiser state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deitfast.engine.optim import (
    Ema,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe

STEPS = 1251


def test_learning_rate_at_the_papers_milestones() -> None:
    recipe = Recipe()
    assert learning_rate(recipe, 0, STEPS) == 1e-6
    assert learning_rate(recipe, STEPS * 5 // 2, STEPS) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-3)
    at_5 = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 5 / 300)) / 2
    assert learning_rate(recipe, 5 * STEPS, STEPS) == pytest.approx(at_5)
    assert learning_rate(recipe, 150 * STEPS, STEPS) == pytest.approx((1e-3 + 1e-5) / 2)
    assert learning_rate(recipe, 300 * STEPS - 1, STEPS) == pytest.approx(1e-5, rel=1e-4)


def test_learning_rate_equals_timms_scheduler_at_every_epoch(timm) -> None:
    from timm.scheduler import CosineLRScheduler

    recipe = Recipe()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    theirs = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    for epoch in range(300):
        theirs.step(epoch)
        assert learning_rate(recipe, epoch * STEPS, STEPS) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def originals_rates(recipe: Recipe) -> list[float]:
    """The learning rate of every epoch as the authors' main.py sets it: the scheduler steps after the epoch."""
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=recipe.epochs, lr_min=recipe.min_lr, warmup_t=int(recipe.warmup_epochs),
        warmup_lr_init=recipe.warmup_lr,
    )  # fmt: skip
    rates = []
    for epoch in range(recipe.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    return rates


@pytest.mark.parametrize(
    "settings",
    [{}, {"warmup_epochs": 0.0}, {"epochs": 30, "lr": 5e-6, "min_lr": 5e-6}, {"epochs": 20, "lr": 5e-6}],
    ids=["paper", "no warm-up", "384 px", "peak below the floor"],
)
def test_deit_compat_is_the_originals_staircase(timm, settings: dict) -> None:
    recipe = replace(Recipe(), deit_compat=True, **settings)
    for epoch, expected in enumerate(originals_rates(recipe)):
        for step in (0, STEPS // 2, STEPS - 1):
            assert learning_rate(recipe, epoch * STEPS + step, STEPS) == pytest.approx(expected, rel=1e-9), epoch


def test_deit_compat_warms_up_a_whole_epoch_late(timm) -> None:
    compat, ours = replace(Recipe(), deit_compat=True), Recipe()
    assert [learning_rate(compat, e * STEPS, STEPS) for e in (0, 1)] == [1e-6, 1e-6]
    assert learning_rate(compat, 2 * STEPS, STEPS) == pytest.approx(learning_rate(ours, STEPS, STEPS))
    assert learning_rate(compat, 300 * STEPS - 1, STEPS) > learning_rate(ours, 299 * STEPS, STEPS)


@pytest.mark.parametrize("decay_dist_token", [False, True])
def test_only_matrices_decay_as_in_timm(timm, decay_dist_token: bool) -> None:
    from timm.optim import param_groups_weight_decay

    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, layer_scale=0.1)
    no_decay = ["pos_embed", "cls_token"] + ([] if decay_dist_token else ["dist_token"])
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_decay)
    for ours, expected in zip(
        parameter_groups(model, 0.05, decay_dist_token), sorted(theirs, key=lambda g: -g["weight_decay"]), strict=True
    ):
        assert ours["weight_decay"] == expected["weight_decay"]
        assert {id(p) for p in ours["params"]} == {id(p) for p in expected["params"]}


def test_the_optimiser_follows_the_recipe() -> None:
    model = create_model("deit_digits_patch4_16", num_classes=3)
    recipe = replace(Recipe(), beta1=0.8, beta2=0.99, adam_eps=1e-7, weight_decay=0.3, lr=0.01)
    adamw = make_optimizer(model, recipe)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [g["weight_decay"] for g in adamw.param_groups] == [0.3, 0.0]
    assert all(g["betas"] == (0.8, 0.99) and g["eps"] == 1e-7 and g["lr"] == 0.01 for g in adamw.param_groups)
    sgd = make_optimizer(model, replace(recipe, optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(g["momentum"] == 0.8 and g["nesterov"] and g["lr"] == 0.01 for g in sgd.param_groups)
    with pytest.raises(DeitfastError, match="--engine plain has no LAMB"):
        make_optimizer(model, replace(recipe, optimizer="lamb"))


def test_deit_compat_decays_the_distillation_token() -> None:
    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    for compat in (False, True):
        decayed = make_optimizer(model, replace(Recipe(), deit_compat=compat)).param_groups[0]["params"]
        assert any(p is model.dist_token for p in decayed) == compat


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("deit_digits_patch4_16", num_classes=3)


def step(model, optimizer, seed: int) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizer_state_survives_by_name_bitwise(name: str) -> None:
    one, two = small(), small()
    recipe = replace(Recipe(), optimizer=name)
    first, second = make_optimizer(one, recipe), make_optimizer(two, recipe)
    step(one, first, 1)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(one, first).items()}
    two.load_state_dict(one.state_dict())
    load_optimizer_tensors(two, second, saved)
    for seed in (2, 3):
        step(one, first, seed)
        step(two, second, seed)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_ema_is_the_recursion_and_swaps_there_and_back() -> None:
    model = small()
    optimizer = make_optimizer(model, replace(Recipe(), lr=1e-2))
    ema = Ema(model, 0.9)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for seed in range(3):
        step(model, optimizer, seed)
        ema.update(model)
        for name, p in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach().double()
    for name, average in ema.tensors.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    averages = {name: p.clone() for name, p in ema.tensors.items()}
    ema.swap(model)
    assert all(torch.equal(p, averages[name]) for name, p in model.named_parameters())
    ema.swap(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
