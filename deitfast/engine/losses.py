"""The training loss: cross-entropy on mixed, smoothed targets without a dense target matrix, and distillation.

Distillation is the DeiT paper's (section 4): loss = (1 - alpha) base + alpha distillation. The base loss reads the
class token's head, the distillation loss the distillation token's; a model without that token gives both from its one
head ("usual" distillation in the paper's tables 2 and 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.loss import mixed_bce, mixed_cross_entropy

if TYPE_CHECKING:
    from deitfast.data import Targets
    from deitfast.recipe import Recipe


def base_loss(logits: Tensor, targets: Targets, recipe: Recipe) -> Tensor:
    """What the labels ask of logits (B, C): the recipe's loss as a fused op; fp32 scalar."""
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
    outputs: Tensor | tuple[Tensor, Tensor], targets: Targets, recipe: Recipe, teacher_logits: Tensor | None = None
) -> Tensor:
    """The loss of a micro-batch, an fp32 scalar: its mean over the images.

    outputs: logits (B, C), or those of a distilled model's two heads. teacher_logits: (B, C), where the recipe distils.
    Without a teacher a distilled model trains the mean of its heads' logits, as it is evaluated.
    """
    head, head_dist = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    if teacher_logits is None:
        if recipe.distillation != "none":
            raise ValueError(f"the recipe distils ({recipe.distillation}), but no teacher's logits were given")
        return base_loss(head if head is head_dist else (head + head_dist) / 2, targets, recipe)
    of_teacher = distillation_loss(head_dist, teacher_logits, recipe.distillation, recipe.distillation_tau)
    alpha = recipe.distillation_alpha
    return (1 - alpha) * base_loss(head, targets, recipe) + alpha * of_teacher
