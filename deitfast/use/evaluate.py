"""Accuracy on a validation set: every image exactly once, at any number of processes."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.data import EvalLoader, Manifest, normalise
from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.model.deit import DeiT
from deitfast.model.preprocessing import Preprocessing
from deitfast.use.graphs import Graphed

CALIBRATION_BINS = 15
_IMAGENETS = Preprocessing()
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


@dataclass(frozen=True)
class Scores:
    """Accuracies in percent, mean cross-entropy, images counted.

    top1_head, top1_dist: of a distilled model's class head and distillation head alone; None for any other model.
    """

    top1: float
    top5: float
    loss: float
    images: int
    top1_head: float | None = None
    top1_dist: float | None = None


@dataclass(frozen=True)
class Details:
    """What lies behind the scores.

    confusion: int64 (classes, classes), images of class row answered as class column. bins: float64 (bins, 3) over the
    confidence of the answer: images, sum of confidences, right answers. real: (right answers, images) by the reassessed
    labels; None without. seconds: of the whole pass on the slowest process, loading included.
    """

    confusion: Tensor
    bins: Tensor
    real: tuple[int, int] | None
    seconds: float

    @property
    def per_class(self) -> Tensor:
        """Accuracy of each class in percent, float64 (classes,); NaN for a class without an image."""
        return 100 * self.confusion.diagonal().double() / self.confusion.sum(1)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over equal bins of confidence, weighted
        by their images (Guo et al. 2017, arXiv 1706.04599)."""
        return float((self.bins[:, 1] - self.bins[:, 2]).abs().sum() / self.bins[:, 0].sum())

    @property
    def images_per_second(self) -> float:
        return float(self.bins[:, 0].sum()) / self.seconds

    @property
    def real_top1(self) -> float | None:
        """Top-1 in percent by the reassessed labels, over the images that have any."""
        return None if self.real is None else 100 * self.real[0] / max(self.real[1], 1)


class Interrupted(Exception):
    """An evaluation that was given up on all processes."""


def evaluate_each(
    model: DeiT, weights: Sequence[Callable[[], AbstractContextManager[None]]], manifest: Manifest, world: World, *,
    crop_ratio: float, batch: int, workers: int, bf16: bool, limit: int | None = None, decode: str = "auto",
    asked_to_stop: Callable[[], bool] | None = None,
) -> list[Scores]:  # fmt: skip
    """Scores of each of several weights of `model` over `manifest`, or its first `limit` images, each decoded once.

    The same numbers on every process. weights: what to enter so that the model has them, for one batch after another.
    crop_ratio: share of the resized side that the centre crop keeps. batch: images a process runs at once. decode: gpu,
    cpu, or auto (where the model is). asked_to_stop: asked before every batch; where it is true on one process, all
    raise Interrupted.
    """
    totals = [torch.zeros(6, dtype=torch.float64, device=world.device) for _ in weights]
    stopped = torch.zeros((), device=world.device)
    images_of = manifest if limit is None else manifest.head(limit)
    loader = _loader(images_of, model, world, crop_ratio, batch, workers, decode)
    forward = _forward(model, world, batch, bf16)
    with _evaluating(model):
        for images, labels in loader:
            if asked_to_stop and asked_to_stop():
                stopped += 1
                break
            for total, entered in zip(totals, weights, strict=True):
                with entered():
                    total += _tally(forward(images), labels)
    if world.sum(stopped).item():
        raise Interrupted
    return [_scores(world.sum(total), model.distilled) for total in totals]


def evaluate_in_detail(
    model: DeiT, manifest: Manifest, world: World, *, crop_ratio: float, batch: int, workers: int, bf16: bool,
    real: Sequence[Sequence[int]] | None = None, decode: str = "auto", preprocessing: Preprocessing = _IMAGENETS,
) -> tuple[Scores, Details]:  # fmt: skip
    """`evaluate_each` with the weights that the model has, and what lies behind the scores.

    preprocessing: all but the crop ratio, which is given. real: the right labels of each image of
    `manifest`, none where there are none (see `real_labels`).
    """
    classes = model.num_classes
    totals = torch.zeros(6, dtype=torch.float64, device=world.device)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=world.device)
    bins = torch.zeros(CALIBRATION_BINS, 3, dtype=torch.float64, device=world.device)
    reassessed = torch.zeros(2, dtype=torch.int64, device=world.device)
    right = None if real is None else _membership(real, classes).to(world.device)
    # A label here is the image's number: whatever the loader leaves out, answers stay with their images.
    labels_M = torch.from_numpy(manifest.label).to(world.device)
    numbered = replace(manifest, label=np.arange(len(manifest)))
    loader = _loader(numbered, model, world, crop_ratio, batch, workers, decode, preprocessing)
    started, forward = time.perf_counter(), _forward(model, world, batch, bf16, preprocessing)
    with _evaluating(model):
        for images, numbers in loader:
            heads, labels = forward(images), labels_M[numbers]
            totals += _tally(heads, labels)
            confidence, answer = heads[0].softmax(1).max(1)
            confusion += torch.bincount(labels * classes + answer, minlength=classes * classes)
            where = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
            values = torch.stack([torch.ones_like(confidence), confidence, (answer == labels).float()], dim=1).double()
            bins.index_add_(0, where, values)
            if right is not None:
                reassessed += torch.stack([right[numbers, answer].sum(), right[numbers].any(1).sum()])
    for tensor in (totals, confusion, bins, reassessed):
        world.sum(tensor)
    seconds = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    seconds[world.rank] = time.perf_counter() - started
    slowest = float(world.sum(seconds).max())
    pair = (int(reassessed[0]), int(reassessed[1]))
    details = Details(confusion.view(classes, classes).cpu(), bins.cpu(), None if real is None else pair, slowest)
    return _scores(totals, model.distilled), details


def real_labels(path: Path, manifest: Manifest) -> list[list[int]]:
    """The labels that ReaL (Beyer et al. 2020, arXiv 2006.07159) gives each image of `manifest`, by the number in its
    name.

    path: their real.json, a list of 50,000 lists. Raises DeitfastError where file or images are others.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DeitfastError(f"{path} cannot be read as ReaL labels: {str(error).splitlines()[0]}") from error
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
        raise DeitfastError(f"{path} holds no list of lists of labels. Give real.json of reassessed-imagenet")
    found = []
    for i in range(len(manifest)):
        number = _VALIDATION_NAME.search(manifest.name(i))
        if number is None or not 0 < int(number[1]) <= len(table):
            raise DeitfastError(
                f"{manifest.name(i)} is none of ILSVRC2012_val_00000001 to {len(table):08d}: no ReaL label"
            )
        found.append(table[int(number[1]) - 1])
    return found


def _loader(
    manifest: Manifest, model: DeiT, world: World, crop_ratio: float, batch: int, workers: int, decode: str,
    wants: Preprocessing = _IMAGENETS,
) -> EvalLoader:  # fmt: skip
    return EvalLoader(
        manifest, image_size=model.image_size, crop_ratio=crop_ratio, batch=batch,
        rank=world.rank, world_size=world.size, device=world.device, workers=workers, decode=decode,
        squash=wants.squash, interpolation=wants.interpolation,
    )  # fmt: skip


@contextlib.contextmanager
def _evaluating(model: DeiT) -> Iterator[None]:
    """The model in evaluation mode, no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _forward(
    model: DeiT, world: World, batch: int, bf16: bool, wants: Preprocessing = _IMAGENETS
) -> Callable[[Tensor], list[Tensor]]:
    """For at most `batch` uint8 images the logits in fp32, then for a distilled model those of its two heads.

    On a GPU by one CUDA graph, which lives as long as what this returns.
    """

    def stacked(images: Tensor) -> Tensor:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            features = model.extract_feat(normalise(images, wants.mean, wants.std))
            heads = [linear(x).float() for x, (_, linear) in zip(features, model.heads(), strict=True)]
        return torch.stack([(heads[0] + heads[1]) / 2, *heads] if model.distilled else heads, 1)

    graphed = Graphed(stacked, world.device, size=batch)
    return lambda images: list(graphed(images).unbind(1))


def _tally(heads: list[Tensor], labels: Tensor) -> Tensor:
    """Of one batch, float64: right at first, right among five, loss, images, right by either head."""
    logits = heads[0]
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    alone = [(head.argmax(1) == labels).sum() for head in heads[1:]] or [loss.new_zeros(())] * 2
    count = loss.new_full((), len(labels))
    return torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, count, *alone]).double()


def _scores(totals: Tensor, distilled: bool) -> Scores:
    right1, right5, loss, images, head, dist = totals.tolist()
    if not images:
        raise DeitfastError("no image could be evaluated")
    alone = (100 * head / images, 100 * dist / images) if distilled else (None, None)
    return Scores(100 * right1 / images, 100 * right5 / images, loss / images, int(images), *alone)


def _membership(real: Sequence[Sequence[int]], classes: int) -> Tensor:
    """bool (images, classes): whether a class is one of an image's labels."""
    table = torch.zeros(len(real), classes, dtype=torch.bool)
    for row, labels in enumerate(real):
        table[row, list(labels)] = True
    return table
