"""Images in, classes out, with the result keys that mmpretrain's users know."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deitfast.errors import DeitfastError
from deitfast.model.class_names import class_names
from deitfast.model.deit import DeiT
from deitfast.model.download import is_url
from deitfast.model.factory import LoadedModel, as_loaded, create_model, load_model
from deitfast.model.weights import find_weight_file
from deitfast.use.images import batches
from deitfast.use.inference import Predictor, pick_device

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

CPU_BATCH, GPU_BATCH = 16, 256
"""Images run at once: on two cores 4 to 16 were fastest, where activations stay in the caches."""

Prediction = dict[str, Any]


class Classifier:
    """A model of `load_model` that predicts; the parts of `inference_model`, for those who call it often."""

    def __init__(
        self, loaded: LoadedModel, device: str | torch.device = "auto", precision: str = "auto", batch: int = 0
    ) -> None:
        self.predictor = Predictor(loaded.model, device, precision, preprocessing=loaded.preprocessing)
        self.classes, self.preprocessing = loaded.classes, loaded.preprocessing
        self.batch = batch or (GPU_BATCH if self.predictor.device.type == "cuda" else CPU_BATCH)

    def stream(self, images: Sequence[Any]) -> Iterator[tuple[int, Prediction | str]]:
        """(index, prediction) of every image as soon as it is there, (index, reason) of those that cannot be read."""
        size, device = self.predictor.image_size, self.predictor.device
        for index, tensor, bad in batches(images, size, self.preprocessing, self.batch, device):
            yield from bad
            if index:
                scores = self.predictor(tensor).softmax(1).cpu().numpy()
                yield from ((i, self._prediction(row)) for i, row in zip(index, scores, strict=True))

    def __call__(self, image: Any) -> Prediction | list[Prediction]:
        """See `inference_model`."""
        several = isinstance(image, (list, tuple))
        images = list(image) if several else [image]
        found: list[Prediction] = [{}] * len(images)
        for i, result in self.stream(images):
            if isinstance(result, str):
                raise DeitfastError(result)
            found[i] = result
        return found if several else found[0]

    def _prediction(self, scores: np.ndarray) -> Prediction:
        label = int(scores.argmax())
        return {
            "pred_label": label,
            "pred_class": self.classes[label],
            "pred_score": float(scores[label]),
            "pred_scores": scores,
        }

    def top(self, prediction: Prediction, count: int) -> list[tuple[int, str, float]]:
        """(label, class, score) of the `count` highest scores."""
        order = np.argsort(-prediction["pred_scores"], kind="stable")[:count]
        return [(int(i), self.classes[i], float(prediction["pred_scores"][i])) for i in order]


def get_model(
    name: str, pretrained: bool | str | Path = False, device: str | torch.device | None = None, **options: Any
) -> DeiT:
    """`create_model` under mmpretrain's name: `name` may be one of its names, and the model is put on `device`.

    Names of weights that mmpretrain trained (`deit-tiny_4xb256_in1k`) bring those with pretrained=True, all others the
    authors'. options: more of `create_model`'s.
    """
    model = create_model(name, pretrained, **options)
    return model if device is None else model.to(pick_device(device))


def inference_model(
    model: str | Path | DeiT,
    image: Any,
    weights: str | Path | None = None,
    device: str | torch.device = "auto",
    *,
    precision: str = "auto",
    classes: Sequence[str] | None = None,
    ema: bool = False,
) -> Prediction | list[Prediction]:
    """What `model` sees in an image, or in each of a list of images.

    model: a name that `create_model` knows, mmpretrain's included, a run's folder or weight file, or a model.
    image: a path, URL, encoded bytes, PIL image or uint8 array (H, W, 3) in RGB; or a list of these, which is run in
    batches. weights: what `read_weights` takes; None for the published ones. classes: class names in index order, where
    the weights bring none. device: cuda, cpu, or auto. precision: bf16, fp16, fp32, or auto (bf16 on a GPU, else fp32).
    ema: the averaged weights, where a run keeps both.

    Returns {"pred_label": int, "pred_class": str, "pred_score": float, "pred_scores": float32 (classes,)}, a list of
    them for a list. A named model stays loaded for the next call. Raises DeitfastError for an unreadable image.
    """
    if isinstance(model, DeiT):
        if weights is not None:
            raise DeitfastError("weights are for a model's name; this model has its own. Use load_weights(model, ...)")
        if ema:
            raise DeitfastError("ema chooses among a run's weights; this model has its own. Give the run's folder")
        return Classifier(as_loaded(model, classes), device, precision)(image)
    if weights is None and (isinstance(model, Path) or os.path.exists(model) or is_url(model)):
        name, weights = None, model
    else:
        name = str(model)
    local = weights is not None and not is_url(weights)
    stamp = find_weight_file(Path(str(weights)), ema).stat().st_mtime_ns if local else 0
    classifier = _loaded(name, None if weights is None else str(weights), str(device), precision, ema, stamp)
    if classes is not None:
        classifier = copy.copy(classifier)
        classifier.classes = class_names(len(classifier.classes), classes)
    return classifier(image)


@lru_cache(maxsize=2)
def _loaded(name: str | None, weights: str | None, device: str, precision: str, ema: bool, stamp: int) -> Classifier:
    """stamp: the weight file's time, so that a changed one is read again."""
    return Classifier(load_model(name, weights, ema=ema), device, precision)


def annotate(image: PILImage, lines: Sequence[tuple[str, float]]) -> PILImage:
    """The image with a strip below that names classes and draws their scores (0 to 1) as bars."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(image.width, 320)
    size = max(width // 28, 13)
    row, margin = round(size * 1.5), size // 2
    font = ImageFont.load_default(size)
    picture = Image.new("RGB", (width, image.height + row * len(lines) + 2 * margin), "white")
    picture.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(picture)
    for i, (name, score) in enumerate(lines):
        top = image.height + margin + i * row
        draw.rectangle((0, top, round(width * score), top + row - 2), fill=(176, 213, 178))
        draw.text((margin, top + row // 2), f"{100 * score:5.1f} %  {name}", fill="black", font=font, anchor="lm")
    return picture
