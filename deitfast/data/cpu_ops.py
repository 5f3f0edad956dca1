"""What a CPU does to images: crop, resize and flip what DALI decoded, and each augmentation as PIL computes it.

PyTorch's antialiased bicubic resize of uint8 images is PIL's algorithm in vector instructions: within a few levels of
PIL, and several times as fast as PIL's and DALI's, in which a CPU loader spends most of its time.

Augmentations equal PIL to the bit, in the least CPU time: PIL itself where it is the fastest way (rotate, equalize,
color, blur), else numpy: a lookup or a few passes over the bytes of a row-major image cost less than converting to
PIL's four bytes a pixel and back. A warp along one axis only interpolates along it, which PIL does not make use of.
Images are uint8 (H, W, 3), contiguous; results are new arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deitfast.data.augmentation_draws import OPS, AugmentationDraws, Matrix, affine_matrix

_CHUNK = 48
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
    if name in ("shear x", "shear y", "translate x", "translate y"):
        return _axis_warp(x, name.endswith("x"), affine_matrix(op, amount, x.shape[1], x.shape[0]), fill)
    if name == "rotate":
        return _pil(x, lambda image: image.rotate(amount, resample=_BICUBIC, fillcolor=fill))
    return _OPERATIONS[name](x, amount)


def _pil(x: np.ndarray, operation: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.asarray(operation(Image.fromarray(x)))


def _chunks(rows: int) -> list[slice]:
    """Blocks of image rows, of which a few float64 intermediates stay in a core's cache."""
    return [slice(top, min(top + _CHUNK, rows)) for top in range(0, rows, _CHUNK)]


def _blend(degenerate: np.ndarray | float, x: np.ndarray, factor: float) -> np.ndarray:
    """PIL's: degenerate + factor * (x - degenerate) in fp32, clipped and truncated."""
    start = np.asarray(degenerate, np.float32)
    mixed = x - start
    mixed *= np.float32(factor)
    mixed += start
    return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _autocontrast(x: np.ndarray, _: float) -> np.ndarray:
    """Every channel's values stretched to 0..255."""
    rows = x.reshape(len(x), -1)
    low, high = (extreme(axis=0).reshape(-1, 3) for extreme in (rows.min, rows.max))
    low, high = low.min(axis=0).astype(np.float64), high.max(axis=0).astype(np.float64)
    scale = np.where(high > low, 255.0 / np.maximum(high - low, 1.0), 1.0)
    offset = np.where(high > low, -low * scale, 0.0)
    if (scale == 1.0).all():
        return x
    out = np.empty_like(rows)
    scale, offset = np.tile(scale, x.shape[1]), np.tile(offset, x.shape[1])
    for part in _chunks(len(x)):
        value = rows[part] * scale
        value += offset
        out[part] = np.clip(value, 0, 255, out=value)
    return out.reshape(x.shape)


def _solarize(x: np.ndarray, threshold: float) -> np.ndarray:
    return x ^ (x >= threshold) * np.uint8(255)


def _solarize_add(x: np.ndarray, amount: float) -> np.ndarray:
    return x + (x < 128) * np.uint8(amount)


def _contrast(x: np.ndarray, factor: float) -> np.ndarray:
    gray = np.asarray(Image.fromarray(x).convert("L"))
    return _blend(int(int(gray.sum(dtype=np.int64)) / gray.size + 0.5), x, factor)


def _sharpness(x: np.ndarray, factor: float) -> np.ndarray:
    """The degenerate image is a 3 x 3 mean with weight 5 at the centre and 1 around it; the border stays."""
    height, width, _ = x.shape
    if height < 3 or width < 3:
        return x
    rows = x.reshape(height, -1).astype(np.int16)
    across = rows[:, :-6] + rows[:, 3:-3]
    across += rows[:, 6:]
    total = across[:-2] + across[1:-1]
    total += across[2:]
    inner = rows[1:-1, 3:-3]
    total += inner << 2
    # Thirteenths never lie on a half, so fp32 rounds them as PIL's sum of fp32 products does.
    smooth = (total * np.float32(1 / 13) + np.float32(0.5)).astype(np.int16)
    out = x.copy()
    out[1:-1, 1:-1] = _blend(smooth, inner, factor).reshape(height - 2, width - 2, 3)
    return out


_OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "autocontrast": _autocontrast,
    "equalize": lambda x, _: _pil(x, ImageOps.equalize),
    "invert": lambda x, _: ~x,
    "posterize": lambda x, bits: x & np.uint8(256 - (1 << (8 - int(bits))) if bits < 8 else 255),
    "solarize": _solarize,
    "solarize add": _solarize_add,
    "color": lambda x, factor: _pil(x, lambda image: ImageEnhance.Color(image).enhance(factor)),
    "contrast": _contrast,
    "brightness": lambda x, factor: _blend(0, x, factor),
    "sharpness": _sharpness,
    "grayscale": lambda x, _: _pil(x, lambda image: image.convert("L").convert("RGB")),
    "blur": lambda x, sigma: _pil(x, lambda image: image.filter(ImageFilter.GaussianBlur(sigma))),
}


def _axis_warp(x: np.ndarray, along_x: bool, matrix: Matrix, fill: tuple[int, int, int]) -> np.ndarray:
    """A shear or translation along one axis: a cubic of four pixels of that axis, which are the same for a whole line.

    PIL's interpolation across the axis falls on whole pixels, where it changes nothing. Coordinates are PIL's to the
    last bit, and the cubic has the same order of operations.
    """
    height, width, _ = x.shape
    a, b, c, d, e, f = matrix
    column, row = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    # at: (1 or H, W) along x, (H, 1 or W) along y; a translation is the same for every line.
    if along_x:
        at, length = a * column + b * (row if b else row[:1]) + c, width
    else:
        at, length = d * (column if d else column[:1]) + e * row + f, height
    start = at - 0.5
    whole = np.floor(start)
    t = start - whole
    whole -= (column if along_x else row) - 0.5
    shift = whole[:, 0] if along_x else whole[0]
    if (whole != (shift[:, None] if along_x else shift)).any():
        # Some pixels of a line fall on whole coordinates, others by rounding a little below: their four differ.
        return _pil(x, lambda image: image.transform(image.size, _AFFINE, matrix, _BICUBIC, fillcolor=fill))
    lines = (_shifted_rows if along_x else _shifted_columns)(x, shift.astype(np.int64) - 1)
    t = np.repeat(t, 3, axis=1) if t.shape[1] > 1 else t
    inside = np.broadcast_to((at >= 0) & (at < length), (height, width))

    out = np.empty((height, 3 * width), np.uint8)
    for rows in _chunks(height):
        seen = np.flatnonzero(inside[rows].any(axis=0))
        if not len(seen):
            continue
        columns = slice(3 * int(seen[0]), 3 * int(seen[-1]) + 3)
        if along_x:
            block = lines[rows, columns.start : columns.stop + 9].astype(np.int16)
            steps = block[:, 3:] - block[:, :-3]
            samples, before, here, after = block[:, 3:-6], steps[:, :-6], steps[:, 3:-3], steps[:, 6:]
        else:
            block = lines[rows.start : rows.stop + 3, columns].astype(np.int16)
            steps = block[1:] - block[:-1]
            samples, before, here, after = block[1:-2], steps[:-2], steps[1:-1], steps[2:]
        at_t = t[rows] if len(t) > 1 else t
        out[rows, columns] = _cubic(samples, before, here, after, at_t[:, columns] if t.shape[1] > 1 else at_t)
    keep = np.repeat(inside * np.uint8(255), 3, axis=1)
    out &= keep
    out |= ~keep & np.tile(np.array(fill, np.uint8), width)
    return out.reshape(x.shape)


def _shifted_rows(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Row y from pixel shift[y] (or shift[0]) on, three pixels longer, the border repeated: uint8 (H, 3 (W + 3))."""
    height, width, _ = x.shape
    left, right = max(-int(shift.min()), 0), max(int(shift.max()) + 3, 0)
    padded = np.concatenate([x[:, :1].repeat(left, 1), x, x[:, -1:].repeat(right, 1)], axis=1).reshape(height, -1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3 * (width + 3), axis=1)
    return windows[np.arange(height), 3 * (shift + left)]


def _shifted_columns(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Column x from pixel shift[x] (or shift[0]) on, three pixels longer, the border repeated: uint8 (H + 3, 3 W)."""
    height, width, _ = x.shape
    top, bottom = max(-int(shift.min()), 0), max(int(shift.max()) + 3, 0)
    padded = np.concatenate([x[:1].repeat(top, 0), x, x[-1:].repeat(bottom, 0)])
    out = np.empty((height + 3, width, 3), np.uint8)
    edges = [0, *(np.flatnonzero(np.diff(shift)) + 1).tolist(), width]
    for left, right in itertools.pairwise(edges):  # neighbouring columns mostly have the same shift
        first = int(shift[left]) + top
        out[:, left:right] = padded[first : first + height + 3, left:right]
    return out.reshape(height + 3, -1)


def _cubic(b: np.ndarray, before: np.ndarray, here: np.ndarray, after: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Cubic convolution (a = -1) at b + t of int16 samples a, b, c, d, given as b, b - a, c - b and d - c.

    Clipped and truncated, in PIL's order of operations: b + t (c - a + t (2 (a - b) + c - d + t (b - a + d - c))).
    Sums of samples are exact; only the products with t round.
    """
    bend = before + after
    value = bend * t
    value -= bend + before
    value *= t
    value += before + here
    value *= t
    value += b
    return np.clip(value, 0, 255, out=value).astype(np.uint8)


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
