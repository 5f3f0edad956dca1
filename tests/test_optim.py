"""The learning rate against the paper's formula, the groups against timm's rule, EMA and optimiser state."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deitfast.losses import soft_cross_entropy, training_loss
from deitfast.model import create_model
from deitfast.optim import (
    Ema,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)
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


def test_only_matrices_decay_as_in_timm(timm) -> None:
    from timm.optim import param_groups_weight_decay

    model = create_model("deit_tiny_distilled_patch16_224", num_classes=3, layer_scale=0.1)
    no_decay = ("pos_embed", "cls_token", "dist_token")
    theirs = param_groups_weight_decay(model, 0.05, no_weight_decay_list=no_decay)
    for ours, expected in zip(
        parameter_groups(model, 0.05), sorted(theirs, key=lambda g: -g["weight_decay"]), strict=True
    ):
        assert ours["weight_decay"] == expected["weight_decay"]
        assert {id(p) for p in ours["params"]} == {id(p) for p in expected["params"]}


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("deit_digits_patch4_16", num_classes=3)


def step(model, optimizer, seed: int) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    model(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_optimizer_state_survives_by_name_bitwise() -> None:
    one, two = small(), small()
    recipe = Recipe()
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


def test_loss_equals_the_dense_formula_and_timms(timm) -> None:
    from timm.loss import SoftTargetCrossEntropy

    from deitfast.data import Targets

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, generator=generator)
    labels, partners = (torch.randint(9, (6,), generator=generator) for _ in range(2))
    targets = Targets(labels, partners, torch.rand(6, generator=generator), smoothing=0.1)
    expected = SoftTargetCrossEntropy()(logits.double(), targets.dense(9).double()).float()
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected, rtol=1e-6, atol=1e-6)
    both = training_loss((logits, -logits / 2), targets)
    torch.testing.assert_close(both, soft_cross_entropy(logits / 4, targets))
