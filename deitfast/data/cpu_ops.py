"""What a CPU does to images: crop, resize and flip what DALI decoded, and each augmentation as PIL computes it.

PyTorch's antialiased bicubic resize of uint8 images is PIL's algorithm in vector instructions: within a few levels of
PIL, and several times as fast as PIL's and DALI's, in which a CPU loader spends most of its time.

Augmentations equal PIL to the bit: PIL itself, or numpy where a few passes over the bytes cost less than converting to
PIL's four bytes a pixel and back. Images are uint8 (H, W, 3), contiguous; results are new arrays.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deitfast.data.augmentation_draws import OPS, AugmentationDraws, affine_matrix

_CHUNK = 64  # rows, of which a few float64 intermediates stay in a core's cache
_AFFINE, _BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC


# Augmentations -------------------------------------------------------------------------------------------------------


def apply(images: np.ndarray, draws: AugmentationDraws, fill: tuple[int, int, int]) -> np.ndarray:
    """Every image (m, H, W, 3) after its operations, as a new array. fill: what warps put outside the image."""
    out = np.empty_like(images)
    for i, (ops, amounts) in enumerate(zip(draws.ops.tolist(), draws.amounts.tolist(), strict=True)):
        x = images[i]
        for op, amount in zip(ops, amounts, strict=True):
            if op:
                x = apply_one(x, op, amount, fill)
        out[i] = x
    return out


def apply_one(x: np.ndarray, op: int, amount: float, fill: tuple[int, int, int]) -> np.ndarray:
    """One operation of one image; op, amount: as in `AugmentationDraws`."""
    name = OPS[op]
    if name == "rotate":
        return _pil(x, lambda image: image.rotate(amount, resample=_BICUBIC, fillcolor=fill))
    if name in ("shear x", "shear y"):
        matrix = affine_matrix(op, amount, x.shape[1], x.shape[0])
        return _pil(x, lambda image: image.transform(image.size, _AFFINE, matrix, _BICUBIC, fillcolor=fill))
    if name == "translate x":
        return _transposed(_moved_rows(_transposed(x), amount, fill))
    if name == "translate y":
        return _moved_rows(x, amount, fill)
    return _OPERATIONS[name](x, amount)


def _pil(x: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.asarray(operation(Image.fromarray(x)))


_OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "autocontrast": lambda x, _: _pil(x, ImageOps.autocontrast),
    "equalize": lambda x, _: _pil(x, ImageOps.equalize),
    "invert": lambda x, _: ~x,
    "posterize": lambda x, bits: x & np.uint8(256 - (1 << (8 - int(bits))) if bits < 8 else 255),
    "solarize": lambda x, threshold: x ^ (x >= threshold) * np.uint8(255),
    "solarize add": lambda x, amount: x + (x < 128) * np.uint8(amount),
    "color": lambda x, factor: _pil(x, lambda image: ImageEnhance.Color(image).enhance(factor)),
    "contrast": lambda x, factor: _pil(x, lambda image: ImageEnhance.Contrast(image).enhance(factor)),
    "brightness": lambda x, factor: _pil(x, lambda image: ImageEnhance.Brightness(image).enhance(factor)),
    "sharpness": lambda x, factor: _pil(x, lambda image: ImageEnhance.Sharpness(image).enhance(factor)),
    "grayscale": lambda x, _: _pil(x, lambda image: image.convert("L").convert("RGB")),
    "blur": lambda x, sigma: _pil(x, lambda image: image.filter(ImageFilter.GaussianBlur(sigma))),
}


def _moved_rows(x: np.ndarray, share: float, fill: tuple[int, int, int]) -> np.ndarray:
    """A translation by a share of the height: PIL's cubic of the four rows around.

    PIL's interpolation along the rows falls on whole pixels, where it changes nothing. Coordinates are PIL's to the
    last bit, and so is the order of operations: b + t (c - a + t (2 (a - b) + c - d + t (b - a + d - c))).
    """
    height = len(x)
    at = np.arange(height) + 0.5 + share * height
    before = np.floor(at - 0.5)
    t = (at - 0.5 - before)[:, None, None]
    out = np.empty_like(x)
    out[:] = fill
    inside = np.flatnonzero((at >= 0) & (at < height))
    for rows in np.split(inside, range(_CHUNK, len(inside), _CHUNK)):
        around = [np.clip(before[rows].astype(np.int64) + k, 0, height - 1) for k in (-1, 0, 1, 2)]
        a, b, c, d = (x[part].astype(np.int16) for part in around)
        value = (b - a + d - c) * t[rows]
        value += 2 * (a - b) + c - d
        value *= t[rows]
        value += c - a
        value *= t[rows]
        value += b
        out[rows] = np.clip(value, 0, 255, out=value)
    return out


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(0, 1))


# Crops, sizes and mirror images ---------------------------------------------------------------------------------------


def resized(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """uint8 (H, W, 3) to uint8 (height, width, 3): bicubic with antialiasing."""
    planes = image.permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def resized_crop(image: torch.Tensor, box: np.ndarray, size: int, mirrored: bool) -> torch.Tensor:
    """The rectangle `box` (top, left, height, width) of an image as uint8 (size, size, 3), mirrored or not."""
    top, left, height, width = box.tolist()
    view = resized(image[top : top + height, left : left + width], size, size)
    return view.flip(1) if mirrored else view
