"""Every random parameter of the augmentation, drawn on the host from Philox: arrays in, arrays out.

What is drawn follows timm's and torchvision's definitions (timm `data/random_erasing.py`, `data/mixup.py`,
`data/transforms.py`); where the numbers come from does not. A rectangle is (top, left, height, width).
"""

from __future__ import annotations

import math

import numpy as np

from deitfast.data.philox import CROP, ERASE, FLIP, MIX, normal_pair, uniforms

_TRIES = 10  # of the random resized crop and of random erasing, in timm and torchvision alike
_GAMMA_TRIES = 16  # one try of Marsaglia-Tsang succeeds more than 95 times in 100


def _randint(u: np.ndarray, count: np.ndarray | int) -> np.ndarray:
    """Uniform integer in [0, count) from u in [0, 1)."""
    return np.floor(u * count).astype(np.int64)


def _first(valid: np.ndarray, tries: np.ndarray) -> np.ndarray:
    """For each column the first row of `tries` (tries, samples) at which `valid` holds (row 0 if none does)."""
    return np.take_along_axis(tries, np.argmax(valid, axis=0)[None], axis=0)[0]


def random_resized_crop(
    width: np.ndarray,
    height: np.ndarray,
    index: np.ndarray,
    epoch: int,
    view: np.ndarray,
    seed: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """Crop rectangles in image pixels: int64 (samples, 4).

    Ten tries of an area uniform in `scale` of the image and a log-uniform aspect ratio; then the largest central crop
    whose ratio is allowed. width, height, index, view: (samples,).
    """
    width, height = np.asarray(width, np.int64), np.asarray(height, np.int64)
    u = uniforms(CROP, index, epoch, view, seed, _TRIES)
    area = (scale[0] + (scale[1] - scale[0]) * u[:, 0]) * (width * height)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * u[:, 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    valid = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    box = np.stack(
        [_first(valid, x) for x in (_randint(u[:, 2], height - h + 1), _randint(u[:, 3], width - w + 1), h, w)], axis=1
    )

    in_ratio = width / height
    fallback_w = np.where(in_ratio > ratio[1], np.rint(height * ratio[1]).astype(np.int64), width)
    fallback_h = np.where(in_ratio < ratio[0], np.rint(width / ratio[0]).astype(np.int64), height)
    central = np.stack([(height - fallback_h) // 2, (width - fallback_w) // 2, fallback_h, fallback_w], axis=1)
    return np.where(valid.any(axis=0)[:, None], box, central)


def flip(index: np.ndarray, epoch: int, view: np.ndarray, seed: int, probability: float = 0.5) -> np.ndarray:
    """Whether each sample is mirrored left to right: bool (samples,)."""
    return uniforms(FLIP, index, epoch, view, seed)[0, 0] < probability


def random_erasing(
    image_size: int, index: np.ndarray, epoch: int, view: np.ndarray, seed: int, probability: float = 0.25
) -> np.ndarray:
    """Rectangle erased from each image_size x image_size sample: int64 (samples, 4), zeros where nothing is.

    With `probability`: area uniform in 2 to 33.3 % of the image, log-uniform aspect ratio .3 to 3.33, ten tries to fit.
    """
    u = uniforms(ERASE, index, epoch, view, seed, _TRIES + 1)
    chosen, u = u[_TRIES, 0] < probability, u[:_TRIES]
    area = (0.02 + (1 / 3 - 0.02) * u[:, 0]) * image_size**2
    bound = math.log(1 / 0.3)
    aspect = np.exp(bound * (2 * u[:, 1] - 1))
    h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    valid = (h < image_size) & (w < image_size)
    top, left = _randint(u[:, 2], image_size - h + 1), _randint(u[:, 3], image_size - w + 1)
    box = np.stack([_first(valid, x) for x in (top, left, h, w)], axis=1)
    return np.where((chosen & valid.any(axis=0))[:, None], box, 0)


def _gamma(alpha: float, u: np.ndarray) -> np.ndarray:
    """Gamma(alpha, 1) of shape (samples,) from uniforms (tries, 4, samples): Marsaglia and Tsang, 2000."""
    shape = alpha if alpha >= 1 else alpha + 1
    d = shape - 1 / 3
    x, _ = normal_pair(u[:, 0], u[:, 1])
    v = np.maximum(1 + x / math.sqrt(9 * d), 1e-100) ** 3
    valid = np.log(1 - u[:, 2]) < x * x / 2 + d - d * v + d * np.log(v)
    value = d * _first(valid, v)
    # Gamma(alpha) = Gamma(alpha + 1) * U**(1 / alpha), which brings alpha below 1 into the method's range.
    return value if alpha >= 1 else value * (1 - u[0, 3]) ** (1 / alpha)


def beta(alpha: float, group: np.ndarray, step: int, seed: int, block: int = 1) -> np.ndarray:
    """Beta(alpha, alpha) of every mix group of a step: float64 (groups,). Uses 2 * 16 Philox blocks from `block` on."""
    u = uniforms(MIX, group, step & 0xFFFFFFFF, step >> 32, seed, block + 2 * _GAMMA_TRIES)[block:]
    a, b = _gamma(alpha, u[:_GAMMA_TRIES]), _gamma(alpha, u[_GAMMA_TRIES:])
    return a / (a + b)


def mix(
    image_size: int,
    groups: int,
    step: int,
    seed: int,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    probability: float = 1.0,
    switch: float = 0.5,
) -> tuple[np.ndarray, np.ndarray]:
    """Mixup or cutmix of every mix group of a global step, one lambda a group (timm's 'batch' mode).

    Returns lam float32 (groups,), the weight of a sample's own label (1: not mixed), and box int64 (groups, 4),
    the rectangle that cutmix takes from the partner (zeros for mixup). Cutmix's lambda is the share that remains
    after the rectangle was clipped at the border.
    """
    lam: np.ndarray = np.ones(groups)
    box: np.ndarray = np.zeros((groups, 4), np.int64)
    if mixup <= 0 and cutmix <= 0:
        return lam.astype(np.float32), box
    group = np.arange(groups)
    u = uniforms(MIX, group, step & 0xFFFFFFFF, step >> 32, seed)[0]
    mixed = u[0] < probability
    cut = u[1] < (switch if mixup > 0 and cutmix > 0 else float(cutmix > 0))
    if mixup > 0:
        lam = np.where(mixed & ~cut, beta(mixup, group, step, seed), lam)
    if cutmix > 0:
        cut &= mixed
        wanted = beta(cutmix, group, step, seed)
        side = np.floor(image_size * np.sqrt(1 - wanted)).astype(np.int64)
        cy, cx = _randint(u[2], image_size), _randint(u[3], image_size)
        top, bottom = (np.clip(cy + d, 0, image_size) for d in (-(side // 2), (side + 1) // 2))
        left, right = (np.clip(cx + d, 0, image_size) for d in (-(side // 2), (side + 1) // 2))
        box = np.where(cut[:, None], np.stack([top, left, bottom - top, right - left], axis=1), 0)
        lam = np.where(cut, 1 - box[:, 2] * box[:, 3] / image_size**2, lam)
    return lam.astype(np.float32), box
