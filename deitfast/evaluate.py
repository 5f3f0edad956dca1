"""Accuracy on a validation set: every image exactly once, at any number of processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deitfast.data import EvalLoader, Manifest, normalise
from deitfast.distributed import World
from deitfast.model import DeiT


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent, mean cross-entropy, images counted."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: DeiT, manifest: Manifest, world: World, *, crop_ratio: float, batch: int, workers: int, bf16: bool,
    limit: int | None = None,
) -> Scores:  # fmt: skip
    """Scores of `model` over `manifest`, or its first `limit` images; the same numbers on every process.

    crop_ratio: share of the resized side that the centre crop keeps. batch: images a process runs at once.
    """
    loader = EvalLoader(
        manifest if limit is None else manifest.head(limit),
        image_size=model.image_size, crop_ratio=crop_ratio, batch=batch,
        rank=world.rank, world=world.size, device=world.device, workers=workers,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for images, labels in loader:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            logits = model(normalise(images)).float()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack(
            [ranked[:, 0].sum(), ranked.sum(), loss, ranked.new_ones((), dtype=torch.long) * len(labels)]
        )
    model.train(was_training)
    correct1, correct5, loss_sum, images_seen = world.sum(totals).tolist()
    return Scores(100 * correct1 / images_seen, 100 * correct5 / images_seen, loss_sum / images_seen, int(images_seen))
