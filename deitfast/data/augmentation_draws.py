"""What the augmentation policy does to each view, drawn on the host from Philox: operations and their amounts.

RandAugment is timm's (`data/auto_augment.py`: two of fifteen operations drawn with replacement, each applied with
probability .5 at a magnitude N(m, mstd) clipped to 0..10); 3-Augment and colour jitter are those of the DeiT III code
(facebookresearch/deit `augment.py`, torchvision `ColorJitter`). Where the random numbers come from is ours.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deitfast.data.philox import JITTER, RANDAUGMENT, THREE_AUGMENT, normal_pair, uniforms
from deitfast.recipe import RAND_AUGMENT

OPS = (
    "none",
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear x",
    "shear y",
    "translate x",
    "translate y",
    "grayscale",
    "blur",
)
"""Names of the operations, which `AugmentationDraws.ops` numbers. 1 to 15 are RandAugment's, in timm's order."""

OP = {name: i for i, name in enumerate(OPS)}
RANDAUGMENT_OPS = 15
WARPS = ("rotate", "shear x", "shear y", "translate x", "translate y")
_JITTER_ORDERS = np.array(
    list(itertools.permutations([OP["brightness"], OP["contrast"], OP["color"]])), np.int64
)  # color is torchvision's saturation


Matrix = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class AugmentationDraws:
    """The operations of m views, applied from the first slot to the last. Takes indices and slices of views.

    ops: int64 (m, slots), positions in `OPS`. amounts: float64 (m, slots), what the operation is given: degrees
    (rotate), bits kept (posterize), first value inverted (solarize), what is added below 128 (solarize add), the factor
    of PIL's ImageEnhance (color, contrast, brightness, sharpness), pixels a pixel (shear), a share of the side
    (translate), standard deviation in pixels (blur); 0 for the others.
    """

    ops: np.ndarray
    amounts: np.ndarray

    def __len__(self) -> int:
        return len(self.ops)

    def __getitem__(self, views: Any) -> AugmentationDraws:
        return AugmentationDraws(self.ops[views], self.amounts[views])

    def captions(self) -> list[str]:
        """One line a view, such as "rotate -12.3, posterize 2"; "unchanged" for a view without operations."""
        lines = []
        for ops, amounts in zip(self.ops.tolist(), self.amounts.tolist(), strict=True):
            done = [(OPS[op], amount) for op, amount in zip(ops, amounts, strict=True) if op]
            lines.append(", ".join(name if name in _PLAIN else f"{name} {a:.3g}" for name, a in done) or "unchanged")
        return lines


_PLAIN = ("autocontrast", "equalize", "invert", "grayscale")


@dataclass(frozen=True)
class RandAugment:
    """rand-mM[-mstdS][-inc1] in timm's notation: magnitude N(m, mstd), for mstd above 100 uniform in 0..m."""

    magnitude: float
    std: float
    increasing: bool

    @classmethod
    def parse(cls, notation: str) -> RandAugment:
        """Raises ValueError for text that is not of the form."""
        match = RAND_AUGMENT.fullmatch(notation)
        if match is None:
            raise ValueError(f"RandAugment {notation!r} is not of the form rand-m9-mstd0.5-inc1")
        return cls(float(match[1]), float(match[2] or 0), match[3] is not None)

    def draw(self, index: np.ndarray, epoch: int, view: np.ndarray, seed: int) -> AugmentationDraws:
        """Two slots for every view; index, view: int64 (m,)."""
        u = uniforms(RANDAUGMENT, index, epoch, view, seed, blocks=4).transpose(2, 0, 1)  # (m, blocks, 4)
        which, applied, sign = u[:, ::2, 0], u[:, ::2, 1], u[:, ::2, 2]  # (m, slots)
        op = 1 + np.floor(RANDAUGMENT_OPS * which).astype(np.int64)
        amount = level(op, self._magnitudes(u[:, 1::2]), np.where(sign < 0.5, 1.0, -1.0), self.increasing)
        done = applied < 0.5
        return AugmentationDraws(np.where(done, op, OP["none"]), np.where(done, amount, 0.0))

    def _magnitudes(self, u: np.ndarray) -> np.ndarray:
        if self.std > 100:
            drawn = self.magnitude * u[..., 0]
        else:
            drawn = self.magnitude + self.std * normal_pair(u[..., 0], u[..., 1])[0]
        return np.clip(drawn, 0.0, 10.0)


def level(op: np.ndarray, magnitude: np.ndarray, sign: np.ndarray, increasing: bool) -> np.ndarray:
    """What timm gives each operation at a magnitude in 0..10: float64, of the shape of the three arrays.

    op: int64, 1 to 15. sign: 1 or -1. increasing: the variants whose effect grows with the magnitude ("inc1"); the
    others draw factors in .1 to 1.9 without a sign, and keep more bits and fewer inverted values at a large magnitude.
    """
    share = magnitude / 10.0
    bits, threshold = np.floor(share * 4), np.minimum(256, np.floor(share * 256))
    if increasing:
        bits, threshold = 4 - bits, 256 - threshold
        factor = np.maximum(0.1, 1.0 + sign * (share * 0.9))
    else:
        factor = share * 1.8 + 0.1
    amounts = {
        "rotate": sign * (share * 30.0),
        "posterize": bits,
        "solarize": threshold,
        "solarize add": np.minimum(128, np.floor(share * 110)),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), factor),
        **dict.fromkeys(("shear x", "shear y"), sign * (share * 0.3)),
        **dict.fromkeys(("translate x", "translate y"), sign * (share * 0.45)),
    }
    drawn = np.zeros(np.shape(op))
    for name, amount in amounts.items():
        drawn = np.where(op == OP[name], amount, drawn)
    return drawn


def three_augment(index: np.ndarray, epoch: int, view: np.ndarray, seed: int) -> AugmentationDraws:
    """One slot: grayscale, solarize from 128 up, or a Gaussian blur of sigma uniform in .1 to 2, equally likely."""
    u = uniforms(THREE_AUGMENT, index, epoch, view, seed)[0]
    op = np.array([OP["grayscale"], OP["solarize"], OP["blur"]])[np.floor(3 * u[0]).astype(np.int64)]
    amount = np.where(op == OP["blur"], 0.1 + (2.0 - 0.1) * u[1], np.where(op == OP["solarize"], 128.0, 0.0))
    return AugmentationDraws(op[:, None], amount[:, None])


def color_jitter(strength: float, index: np.ndarray, epoch: int, view: np.ndarray, seed: int) -> AugmentationDraws:
    """Three slots: brightness, contrast and saturation ("color") in a random order, each factor uniform in
    max(0, 1 - strength) to 1 + strength."""
    u = uniforms(JITTER, index, epoch, view, seed)[0]
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    order = np.floor(len(_JITTER_ORDERS) * u[3]).astype(np.int64)
    return AugmentationDraws(_JITTER_ORDERS[order], low + (high - low) * u[:3].T)


def join(draws: list[AugmentationDraws], views: int) -> AugmentationDraws:
    """The slots of several draws of the same views one after the other; none at all for an empty list."""
    ops = [np.zeros((views, 0), np.int64)] + [d.ops for d in draws]
    amounts = [np.zeros((views, 0))] + [d.amounts for d in draws]
    return AugmentationDraws(np.concatenate(ops, axis=1), np.concatenate(amounts, axis=1))


def affine_matrix(op: int, amount: float, width: int, height: int) -> Matrix:
    """Output to input coordinates (a, b, c, d, e, f) of a warp, x' = a x + b y + c and y' = d x + e y + f in pixels.

    As PIL's `Image.rotate` and timm compute them, in the same order of float64 operations.
    """
    name = OPS[op]
    if name == "rotate":
        angle = -math.radians(amount % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        minus_sin = round(-math.sin(angle), 15)
        x, y = width / 2.0, height / 2.0
        return cos, sin, cos * -x + sin * -y + x, minus_sin, cos, minus_sin * -x + cos * -y + y
    return {
        "shear x": (1.0, amount, 0.0, 0.0, 1.0, 0.0),
        "shear y": (1.0, 0.0, 0.0, amount, 1.0, 0.0),
        "translate x": (1.0, 0.0, amount * width, 0.0, 1.0, 0.0),
        "translate y": (1.0, 0.0, 0.0, 0.0, 1.0, amount * height),
    }[name]


def blur_taps(sigma: float) -> tuple[int, int, int]:
    """Weights, in 2**-24, of a pixel, of its two neighbours and of the two after them: one pass of PIL's blur.

    PIL's Gaussian is three box filters along each axis, a box of fractional length (Gwosdek et al., SSVM 2011).
    float32 where PIL (`libImaging/BoxBlur.c`) has float. Raises ValueError for sigma above 2.4, which needs more taps.
    """
    f = np.float32
    variance = f(f(sigma) * f(sigma) / f(3))
    length = f(math.sqrt(12.0 * float(variance) + 1.0))
    whole = f(math.floor((float(length) - 1.0) / 2.0))
    part = (f(2) * whole + f(1)) * (whole * (whole + f(1)) - f(3) * variance)
    part = part / (f(6) * (variance - (whole + f(1)) * (whole + f(1))))
    radius = f(whole + part)
    if not 0 <= radius < 2:
        raise ValueError(f"blur of standard deviation {sigma:g} needs a radius in [0, 2), not {radius:g}")
    inner = int(f(1 << 24) / (radius * f(2) + f(1)))
    outer = ((1 << 24) - (2 * int(radius) + 1) * inner) // 2
    return (inner, inner, outer) if radius >= 1 else (inner, outer, 0)
