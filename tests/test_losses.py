"""Losses against timm's on dense targets and against the formulas of the authors' losses.py in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.data import Targets
from deitfast.engine.losses import balancing_weights, base_loss, distillation_loss, training_loss
from deitfast.recipe import Recipe
from tests.reference import dense

IMAGES, CLASSES = 6, 9


def draw(seed: int = 0) -> Tensor:
    return 3 * torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(seed))


def mixture(smoothing: float) -> Targets:
    """Mixtures of two labels, among them one of equal labels, one unmixed and one that is all its partner."""
    generator = torch.Generator().manual_seed(9)
    labels, partners = (torch.randint(CLASSES, (IMAGES,), generator=generator) for _ in range(2))
    partners[0] = labels[0]
    partners[1:] = torch.where(partners[1:] == labels[1:], (labels[1:] + 1) % CLASSES, partners[1:])
    lam = torch.rand(IMAGES, generator=generator)
    lam[1], lam[2] = 1.0, 0.0
    return Targets(labels, partners, lam, smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_timms_on_dense_targets(timm, smoothing: float) -> None:
    from timm.loss import SoftTargetCrossEntropy

    targets = mixture(smoothing)
    expected = SoftTargetCrossEntropy()(draw().double(), dense(targets, CLASSES).double()).float()
    torch.testing.assert_close(base_loss(draw(), targets, Recipe()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_equals_torchs_on_dense_targets(smoothing: float) -> None:
    targets, weights = mixture(smoothing), torch.linspace(0.2, 3, CLASSES)
    unsmoothed = dense(replace(targets, smoothing=0.0), CLASSES).double()
    expected = F.cross_entropy(draw().double(), unsmoothed, weight=weights.double(), label_smoothing=smoothing)
    ours = training_loss(draw(), targets, Recipe(), class_weights=weights)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-6, atol=1e-6)
    ones = training_loss(draw(), targets, Recipe(), class_weights=torch.ones(CLASSES))
    torch.testing.assert_close(ones, base_loss(draw(), targets, Recipe()), rtol=1e-6, atol=1e-6)


def test_balancing_weights_are_scikit_learns() -> None:
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    labels = np.array([0, 0, 0, 0, 0, 2, 2, 3])
    expected = compute("balanced", classes=np.array([0, 2, 3]), y=labels)
    weights = balancing_weights(labels, 5)
    torch.testing.assert_close(weights[[0, 2, 3]], torch.tensor(expected, dtype=torch.float32))
    assert weights[1] == weights[4] == 1
    assert weights[labels].mean().item() == pytest.approx(1)  # the learning rate means what it meant


def test_binary_cross_entropy_equals_timms_with_threshold_zero(timm) -> None:
    from timm.loss import BinaryCrossEntropy

    targets = mixture(0.0)
    theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    expected = theirs(draw().double(), dense(targets, CLASSES).double()).float()
    bce = training_loss(draw(), targets, replace(Recipe(), loss="bce", smoothing=0.0))
    torch.testing.assert_close(bce, expected, rtol=1e-6, atol=1e-6)


def softmax64(logits: Tensor) -> Tensor:
    powers = logits.double().exp()
    return powers / powers.sum(1, keepdim=True)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_choice() -> None:
    student, teacher = draw(1), draw(2)
    chosen = [max(range(CLASSES), key=row.__getitem__) for row in teacher.tolist()]
    expected = -sum(softmax64(student)[i, c].log() for i, c in enumerate(chosen)) / IMAGES
    torch.testing.assert_close(distillation_loss(student, teacher, "hard").double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_is_the_authors_divergence(tau: float) -> None:
    student, teacher = draw(1), draw(2)
    p, q = softmax64(teacher / tau), softmax64(student / tau)
    expected = (p * (p.log() - q.log())).sum() * tau**2 / (IMAGES * CLASSES)
    torch.testing.assert_close(
        distillation_loss(student, teacher, "soft", tau).double(), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_two_losses_share_by_alpha_and_read_their_own_heads(kind: str, alpha: float) -> None:
    targets, teacher = mixture(0.1), draw(2)
    recipe = replace(Recipe(), distillation=kind, teacher="x", distillation_alpha=alpha, distillation_tau=2.0)
    head, head_dist = draw(3).requires_grad_(), draw(4).requires_grad_()
    loss = training_loss((head, head_dist), targets, recipe, teacher)
    base, of_teacher = base_loss(head, targets, Recipe()), distillation_loss(head_dist, teacher, kind, 2.0)
    torch.testing.assert_close(loss, (1 - alpha) * base + alpha * of_teacher)
    loss.backward()
    assert bool(head.grad.any()) == (alpha < 1)
    assert bool(head_dist.grad.any()) == (alpha > 0)


def test_a_model_of_one_head_gives_it_both_losses() -> None:
    targets, teacher, logits = mixture(0.1), draw(2), draw(3)
    recipe = replace(Recipe(), distillation="hard", teacher="x")
    expected = (base_loss(logits, targets, Recipe()) + distillation_loss(logits, teacher, "hard")) / 2
    torch.testing.assert_close(training_loss(logits, targets, recipe, teacher), expected)


def test_without_a_teacher_a_distilled_model_trains_what_is_evaluated() -> None:
    targets = mixture(0.1)
    both = training_loss((draw(1), draw(2)), targets, Recipe())
    torch.testing.assert_close(both, base_loss((draw(1) + draw(2)) / 2, targets, Recipe()))
    with pytest.raises(ValueError, match=r"distils \(hard\), but no teacher's logits"):
        training_loss((draw(1), draw(2)), targets, replace(Recipe(), distillation="hard", teacher="x"))


def test_low_precision_logits_are_judged_in_fp32() -> None:
    targets, teacher = mixture(0.1), draw(2)
    recipe = replace(Recipe(), distillation="soft", teacher="x")
    logits = draw(1).bfloat16()
    loss = training_loss(logits, targets, recipe, teacher.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, training_loss(logits.float(), targets, recipe, teacher.bfloat16().float()))
