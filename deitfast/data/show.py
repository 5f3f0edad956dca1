"""`deitfast data show`: what training sees, as one picture that a person can check by eye."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from deitfast.data.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, prepare
from deitfast.data.manifest import Manifest
from deitfast.data.sampler import Order
from deitfast.data.train_loader import TrainLoader
from deitfast.errors import DeitfastError

if TYPE_CHECKING:
    from PIL import Image

    from deitfast.recipe import Recipe

_LINE_HEIGHT, _GAP = 13, 8
_NARROWEST = 150  # pixels of a cell: captions need room also under small images
_TINY, _SHOWN = 32, 96  # sides up to the one are shown at about the other, every pixel as a square


def contact_sheet(
    manifest: Manifest, recipe: Recipe, image_size: int, epoch: int, count: int, mixed: bool = False, width: int = 1500
) -> Image.Image:
    """The first `count` views of an epoch in slot order, each with file name, label and operations as its caption.

    The views come out of the training loader itself. mixed: after the device stage, too (erased and mixed; normalising
    is undone), with the weight of the own image. Neighbours in a pair are mixed with each other. width: of the picture
    at most, pixels, where it holds more than one view.
    Raises DeitfastError for an epoch or a count out of range.
    """
    if not 0 <= epoch < max(recipe.epochs, 1):
        raise DeitfastError(f"--epoch is {epoch}, must be in [0, {recipe.epochs - 1}]: epochs are counted from 0")
    if not 1 <= count <= 1024:
        raise DeitfastError(f"--count is {count}, must be in [1, 1024]")
    steps = Order.of(manifest.label, recipe).steps_per_epoch
    units = range(recipe.unit, min(64, recipe.batch) + 1, recipe.unit)
    micro = max(m for m in units if recipe.batch % m == 0)
    views: list[np.ndarray] = []
    captions: list[list[str]] = []
    first, stop = epoch * steps, (epoch + 1) * steps
    settings = replace(recipe, bad_limit=1.0)
    with TrainLoader(manifest, settings, image_size, micro, start_step=first, stop_step=stop) as loader:
        for batch in loader:
            views += list(_pixels(batch, recipe) if mixed else batch.images.numpy())
            captions += _captions(loader, batch, mixed)
            if len(views) >= count:
                break
    return _sheet(views[:count], captions[:count], width)


def _pixels(batch: Batch, recipe: Recipe) -> np.ndarray:
    """A batch after the device stage as uint8 (m, H, W, 3) again; noise is clipped."""
    images, _ = prepare(batch, recipe)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = (images * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _captions(loader: TrainLoader, batch: Batch, mixed: bool) -> list[list[str]]:
    """Lines for each view: its file and view, its class, its operations and, where mixed, what it is mixed with."""
    manifest, index, view = loader.manifest, batch.index.numpy(), batch.view.numpy()
    operations = ["unchanged"] * len(index)
    if loader.augmentation.active:
        operations = loader.augmentation.draw(index, int(batch.epoch), view).captions()
    lines = []
    for s, i in enumerate(index.tolist()):
        name = manifest.name(i).split("/")[-1]
        caption = [name, f"view {view[s]} of class {manifest.classes[manifest.label[i]]}"]
        caption.append(operations[s])
        if mixed and batch.lam[s] < 1:
            way = "cutmix" if batch.mix_box[s].any() else "mixup"
            caption.append(f"{way}, own weight {batch.lam[s]:.2f}")
        lines.append(caption)
    return lines


def _sheet(views: list[np.ndarray], captions: list[list[str]], most: int) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    side = views[0].shape[0]
    size = side * (_SHOWN // side) if side <= _TINY else side
    font = ImageFont.load_default(size=10)
    width = max(size, _NARROWEST) + _GAP
    characters = int((width - _GAP) / font.getlength("n"))
    wrapped = [[part for line in lines for part in textwrap.wrap(line, characters)] for lines in captions]
    height = size + max(map(len, wrapped)) * _LINE_HEIGHT + _GAP
    columns = max(min(len(views), (most - _GAP) // width), 1)
    rows = -(-len(views) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (pixels, lines) in enumerate(zip(views, wrapped, strict=True)):
        left, top = _GAP + n % columns * width, _GAP + n // columns * height
        sheet.paste(Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST), (left, top))
        for k, line in enumerate(lines):
            draw.text((left, top + size + k * _LINE_HEIGHT), line, fill="black", font=font)
    return sheet
