"""The training loss: cross-entropy on mixed, smoothed targets without a dense target matrix, and distillation.

Distillation is the DeiT paper's (section 4): loss = (1 - alpha) base + alpha distillation. The base loss reads the
class token's head, the distillation loss the distillation token's; a model without that token gives both from its one
head ("usual" distillation in the paper's tables 2 and 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.data.batch import Targets
from deitfast.kernels.loss import mixed_bce, mixed_cross_entropy
from deitfast.recipe import Recipe


def balancing_weights(labels: Sequence[int] | np.ndarray, classes: int) -> Tensor:
    """What each class weighs so that all have an equal part in the loss of these labels: fp32 (classes,).

    Images / (classes that have any x images of the class), scikit-learn's "balanced"; 1 for a class without images.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def weighted_cross_entropy(logits: Tensor, targets: Targets, class_weights: Tensor) -> Tensor:
    """Mean over the images of -sum_j w_j t_j log p_j, by PyTorch on dense targets: fp32 scalar. class_weights: (C,)."""
    classes = torch.arange(logits.shape[1], device=logits.device)
    own, partners = (labels[:, None] == classes for labels in (targets.labels, targets.partner_labels))
    shares = targets.lam[:, None] * own + (1 - targets.lam[:, None]) * partners
    return F.cross_entropy(logits.float(), shares, weight=class_weights, label_smoothing=targets.smoothing)


def base_loss(logits: Tensor, targets: Targets, recipe: Recipe, class_weights: Tensor | None = None) -> Tensor:
    """What the labels ask of logits (B, C): the recipe's loss, a fused op unless classes have weights; fp32 scalar."""
    if class_weights is not None:
        return weighted_cross_entropy(logits, targets, class_weights)
    if recipe.loss == "bce":
        return mixed_bce(logits, targets.labels, targets.partner_labels, targets.lam)
    return mixed_cross_entropy(logits, targets.labels, targets.partner_labels, targets.lam, targets.smoothing)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, kind: str, tau: float = 1.0) -> Tensor:
    """What of the teacher's logits (B, C) the student's (B, C) miss; fp32 scalar.

    kind: "hard" is the cross-entropy with the teacher's argmax, unsmoothed; "soft" the Kullback-Leibler divergence at
    temperature tau, summed, times tau^2, over B x C (losses.py of facebookresearch/deit divides by the number of
    logits, not of images).
    """
    if kind == "hard":
        return F.cross_entropy(logits.float(), teacher_logits.argmax(dim=1))
    student, teacher = (F.log_softmax(x.float() / tau, dim=1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / logits.numel()


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor], targets: Targets, recipe: Recipe, teacher_logits: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of a micro-batch, an fp32 scalar: its mean over the images.

    outputs: logits (B, C), or those of a distilled model's two heads. teacher_logits: (B, C), where the recipe distils.
    class_weights: (C,), where rare classes are to weigh more. Without a teacher a distilled model trains the mean of
    its heads' logits, as it is evaluated.
    """
    head, head_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    if teacher_logits is None:
        if recipe.distillation != "none":
            raise ValueError(f"the recipe distils ({recipe.distillation}), but no teacher's logits were given")
        return base_loss(head if head is head_dist else (head + head_dist) / 2, targets, recipe, class_weights)
    of_teacher = distillation_loss(head_dist, teacher_logits, recipe.distillation, recipe.distillation_tau)
    alpha = recipe.distillation_alpha
    return (1 - alpha) * base_loss(head, targets, recipe, class_weights) + alpha * of_teacher
