"""Losses on mixed, smoothed targets without a dense target matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from deitfast.data import Targets


def soft_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    """Mean cross-entropy of logits (B, C) with smoothed mixtures of two labels; fp32 scalar.

    The target of an image is (1 - s) (lam onehot(label) + (1 - lam) onehot(partner)) + s / C, with s the smoothing.
    """
    log_p = F.log_softmax(logits.float(), dim=-1)
    of_label = log_p.gather(1, targets.labels[:, None]).squeeze(1)
    of_partner = log_p.gather(1, targets.partner_labels[:, None]).squeeze(1)
    of_mixture = targets.lam * of_label + (1 - targets.lam) * of_partner
    return -((1 - targets.smoothing) * of_mixture + targets.smoothing * log_p.mean(-1)).mean()


def training_loss(outputs: Tensor | tuple[Tensor, Tensor], targets: Targets) -> Tensor:
    """The base loss. A distilled model without a teacher trains the mean of its heads' logits, as it is evaluated."""
    if isinstance(outputs, tuple):
        outputs = (outputs[0] + outputs[1]) / 2
    return soft_cross_entropy(outputs, targets)
