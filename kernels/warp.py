"""Affine warp of uint8 images with cubic interpolation, equal to PIL's `Image.transform` in every bit.

Output pixel (x, y) is read at (a (x + .5) + b (y + .5) + c, d (x + .5) + e (y + .5) + f), in pixels; where that lies
outside the image, it is the fill. Cubic convolution (a = -1) over 4 x 4 pixels, first along x, then along y, neighbours
outside repeating the border; clipped and truncated, not rounded. Definitions: Pillow, `libImaging/Geometry.c`.

All of it in fp64, like PIL. Interpolation in fp32 put .003 to .013 % of the values of 40 photographs a level off, for
truncation shows the last bit; and a warped view is some ten million operations, which any GPU's fp64 units do in far
less time than a training step takes on it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

AFFINE = tl.constexpr(10)  # amounts: the six coefficients


def cubic_reference(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Cubic convolution at b + t, 0 <= t < 1, through four samples one apart; in this order of operations."""
    return b + t * (-a + c + t * (2 * (a - b) + c - d + t * (-a + b - c + d)))


def affine_reference(x: Tensor, matrix: Tensor, fill: tuple[int, int, int]) -> Tensor:
    """Warp images uint8 (m, H, W, 3), each by the first six of its row of matrix (m, 6 or more)."""
    m, height, width, _ = x.shape
    a, b, c, d, e, f = matrix.to(x.device).double()[:, :6, None, None].unbind(1)
    column = torch.arange(width, device=x.device).double() + 0.5
    row = (torch.arange(height, device=x.device).double() + 0.5)[:, None]
    at_x, at_y = a * column + b * row + c, d * column + e * row + f
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    at_x, at_y = at_x - 0.5, at_y - 0.5
    left, top = at_x.floor(), at_y.floor()
    tx, ty = (at_x - left)[..., None], (at_y - top)[..., None]
    pixels = x.reshape(m, height * width, 3)

    def tap(i: int, j: int) -> Tensor:
        y = (top.long() - 1 + i).clamp(0, height - 1)
        at = y * width + (left.long() - 1 + j).clamp(0, width - 1)
        return pixels.gather(1, at.reshape(m, -1, 1).expand(-1, -1, 3)).reshape(x.shape).double()

    r0, r1, r2, r3 = (cubic_reference(tap(i, 0), tap(i, 1), tap(i, 2), tap(i, 3), tx) for i in range(4))
    out = cubic_reference(r0, r1, r2, r3, ty).clamp(0, 255).to(torch.uint8)
    return torch.where(inside[..., None], out, torch.tensor(fill, dtype=torch.uint8, device=x.device))


@triton.jit
def cubic(a, b, c, d, t):
    return b + t * (-a + c + t * (2 * (a - b) + c - d + t * (-a + b - c + d)))


@triton.jit
def cubic_row(row, x0, x1, x2, x3, t, mask):
    """Interpolate along x in the image row (of one channel) that each lane of `row` points at."""
    a = tl.load(row + x0, mask=mask, other=0).to(tl.float64)
    b = tl.load(row + x1, mask=mask, other=0).to(tl.float64)
    c = tl.load(row + x2, mask=mask, other=0).to(tl.float64)
    d = tl.load(row + x3, mask=mask, other=0).to(tl.float64)
    return cubic(a, b, c, d, t)


@triton.jit
def clamp(value, last):
    return tl.minimum(tl.maximum(value, 0), last)


@triton.jit
def affine(source, destination, pixel, matrix, fill, H, W, mask):
    """Write the warped `pixel`s of one image; matrix points at its six coefficients, fill is 0xBBGGRR."""
    column, row = (pixel % W).to(tl.float64) + 0.5, (pixel // W).to(tl.float64) + 0.5
    at_x = tl.load(matrix) * column + tl.load(matrix + 1) * row + tl.load(matrix + 2)
    at_y = tl.load(matrix + 3) * column + tl.load(matrix + 4) * row + tl.load(matrix + 5)
    inside = mask & (at_x >= 0) & (at_x < W) & (at_y >= 0) & (at_y < H)
    at_x -= 0.5
    at_y -= 0.5
    left, top = tl.floor(at_x), tl.floor(at_y)
    tx, ty = at_x - left, at_y - top
    x, y = left.to(tl.int32), top.to(tl.int32)
    x0, x1, x2, x3 = 3 * clamp(x - 1, W - 1), 3 * clamp(x, W - 1), 3 * clamp(x + 1, W - 1), 3 * clamp(x + 2, W - 1)
    for channel in tl.static_range(3):
        image = source + channel
        r0 = cubic_row(image + 3 * W * clamp(y - 1, H - 1), x0, x1, x2, x3, tx, inside)
        r1 = cubic_row(image + 3 * W * clamp(y, H - 1), x0, x1, x2, x3, tx, inside)
        r2 = cubic_row(image + 3 * W * clamp(y + 1, H - 1), x0, x1, x2, x3, tx, inside)
        r3 = cubic_row(image + 3 * W * clamp(y + 2, H - 1), x0, x1, x2, x3, tx, inside)
        value = tl.minimum(tl.maximum(cubic(r0, r1, r2, r3, ty), 0.0), 255.0).to(tl.int32)
        value = tl.where(inside, value, (fill >> (8 * channel)) & 255)
        tl.store(destination + 3 * pixel + channel, value.to(tl.uint8), mask=mask)
