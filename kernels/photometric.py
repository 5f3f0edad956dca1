"""Lookup tables, colour and sharpness of uint8 images, equal to PIL in every bit; device functions, no public op.

A photometric operation on an image (H, W, 3) is one of

    table      out = table[channel][in]: autocontrast, equalize, posterize, solarize (invert), solarize add, contrast,
               brightness. Autocontrast and equalize take a channel's histogram, contrast the mean of the gray image.
    blend      out = degenerate + factor * (in - degenerate), clipped and truncated, in fp32 without fused
               multiply-adds: color (degenerate: the gray image) and sharpness (a 3 x 3 smoothing; the border is kept)

One program of `tables_kernel` writes the table of one channel. The definitions are those of Pillow (`ImageOps`,
`ImageEnhance`, `libImaging/{Blend,Convert,Filter}.c`), read from its source.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NONE = tl.constexpr(0)
AUTOCONTRAST = tl.constexpr(1)
EQUALIZE = tl.constexpr(2)
POSTERIZE = tl.constexpr(3)  # amount: the bits kept, as a mask: 0xF0 keeps four
SOLARIZE = tl.constexpr(4)  # amount: the first value inverted; 0 inverts the image
SOLARIZE_ADD = tl.constexpr(5)  # amount: added to values below 128
CONTRAST = tl.constexpr(6)  # amount: factor
BRIGHTNESS = tl.constexpr(7)  # amount: factor
LAST_TABLE = BRIGHTNESS
COLOR = tl.constexpr(8)  # amount: factor; 0 is grayscale
SHARPNESS = tl.constexpr(9)  # amount: factor


def blend_reference(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (x - degenerate), clipped to 0..255 and truncated to uint8; factor broadcasts."""
    degenerate = degenerate.float()
    return (degenerate + factor.float() * (x.float() - degenerate)).clamp(0, 255).to(torch.uint8)


def gray_reference(x: Tensor) -> Tensor:
    """ITU-R 601 luma of uint8 (..., 3), rounded: int32 (...)."""
    red, green, blue = x.int().unbind(-1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def tables_reference(x: Tensor, op: Tensor, amount: Tensor) -> Tensor:
    """Tables uint8 (m, 3, 256) of images uint8 (m, H, W, 3); op (m,), AUTOCONTRAST to BRIGHTNESS, amount (m,)."""
    m, pixels = len(x), x.shape[1] * x.shape[2]
    values = x.reshape(m, pixels, 3).transpose(1, 2).long()
    histogram = torch.zeros(m, 3, 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    i = torch.arange(256, device=x.device)
    low = torch.where(histogram > 0, i, 255).amin(-1, keepdim=True)
    high = torch.where(histogram > 0, i, 0).amax(-1, keepdim=True)

    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255.0) / span  # 255.0 / tensor would multiply by the reciprocal: another rounding
    stretched = (i * scale + -low * scale).clamp(0, 255).long()
    step = (pixels - histogram.gather(2, high)) // 255
    before = histogram.cumsum(-1) - histogram
    equalized = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)

    amount = amount.to(x.device).double()[:, None, None]
    whole = amount.long()
    mean = ((2 * gray_reference(x).sum((1, 2), dtype=torch.int64) + pixels) // (2 * pixels))[:, None, None]
    tables = {
        AUTOCONTRAST: torch.where(high > low, stretched, i),
        EQUALIZE: torch.where((step > 0) & (high > low), equalized, i),
        POSTERIZE: i & whole,
        SOLARIZE: torch.where(i < whole, i, 255 - i),
        SOLARIZE_ADD: torch.where(i < 128, (i + whole).clamp(max=255), i),
        CONTRAST: blend_reference(mean, i, amount),
        BRIGHTNESS: blend_reference(torch.zeros_like(mean), i, amount),
    }
    table = i.expand(m, 3, 256)
    for code, candidate in tables.items():
        table = torch.where((op == code.value)[:, None, None].to(x.device), candidate.long(), table)
    return table.to(torch.uint8)


def look_up_reference(x: Tensor, tables: Tensor) -> Tensor:
    """tables[sample, channel, x] for images uint8 (m, H, W, 3) and tables uint8 (m, 3, 256)."""
    m = len(x)
    return tables.gather(2, x.reshape(m, -1, 3).transpose(1, 2).long()).transpose(1, 2).reshape(x.shape)


def smooth_reference(x: Tensor) -> Tensor:
    """3 x 3 mean with weight 5 at the centre and 1 around it, rounded; the border as it is. int64 (m, H, W, 3)."""
    out = x.long()
    height, width = x.shape[1:3]
    if height < 3 or width < 3:
        return out
    total = 4 * out[:, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + out[:, row : row + height - 2, column : column + width - 2]
    out[:, 1:-1, 1:-1] = (2 * total + 13) // 26
    return out


@triton.jit
def blend(degenerate, value, factor):
    """degenerate, value int32; factor fp32. -> int32 in 0..255."""
    start = degenerate.to(tl.float32)
    mixed = start + factor * (value.to(tl.float32) - start)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def gray(red, green, blue):
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


@triton.jit
def smooth(source, offset, pixel, H, W, mask):
    """Smoothed bytes at `offset` = 3 * pixel + channel of one image: int32; the border as it is."""
    y, x = pixel // W, pixel % W
    centre = tl.load(source + offset, mask=mask, other=0).to(tl.int32)
    inside = mask & (y > 0) & (y < H - 1) & (x > 0) & (x < W - 1)
    total = 5 * centre
    for row in tl.static_range(-1, 2):
        for column in tl.static_range(-1, 2):
            if row != 0 or column != 0:
                total += tl.load(source + offset + 3 * (row * W + column), mask=inside, other=0).to(tl.int32)
    return tl.where(inside, (2 * total + 13) // 26, centre)


@triton.jit
def source_of(images, previous, first, sample, PIXELS):
    """Where the sample's operation reads: the images if it is the sample's first, else what the slot before wrote."""
    offset = sample.to(tl.int64) * PIXELS * 3
    if first:
        source = images + offset
    else:
        source = previous + offset
    return source


@triton.jit
def tables_kernel(
    images,  # (m, H, W, 3) uint8
    previous,  # (m, H, W, 3) uint8: what the slot before wrote
    plan,  # (m, 8) fp64: operation, whether it is the sample's first, amounts
    tables,  # (m, 3, 256) uint8, written where the operation is a table
    PIXELS,
    BLOCK: tl.constexpr,
):
    sample, channel = tl.program_id(0), tl.program_id(1)
    op = tl.load(plan + sample * 8).to(tl.int32)
    if (op > NONE) & (op <= LAST_TABLE):
        source = source_of(images, previous, tl.load(plan + sample * 8 + 1) != 0, sample, PIXELS)
        amount = tl.load(plan + sample * 8 + 2)
        whole = amount.to(tl.int32)
        i = tl.arange(0, 256)
        value = i
        if op <= EQUALIZE:
            histogram = tl.zeros((256,), tl.int32)
            for start in tl.range(0, PIXELS, BLOCK):
                pixel = start + tl.arange(0, BLOCK)
                mask = pixel < PIXELS
                seen = tl.load(source + 3 * pixel + channel, mask=mask, other=0).to(tl.int32)
                histogram += tl.histogram(seen, 256, mask=mask)
            low = tl.min(tl.where(histogram > 0, i, 255))
            high = tl.max(tl.where(histogram > 0, i, 0))
            if op == AUTOCONTRAST:
                scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
                stretched = i.to(tl.float64) * scale + (-low).to(tl.float64) * scale
                stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
                value = tl.where(high > low, stretched, i)
            else:
                step = (PIXELS - tl.sum(tl.where(i == high, histogram, 0))) // 255
                before = tl.cumsum(histogram) - histogram
                equalized = tl.minimum((step // 2 + before) // tl.maximum(step, 1), 255)
                value = tl.where((step > 0) & (high > low), equalized, i)
        elif op == POSTERIZE:
            value = i & whole
        elif op == SOLARIZE:
            value = tl.where(i < whole, i, 255 - i)
        elif op == SOLARIZE_ADD:
            value = tl.where(i < 128, tl.minimum(i + whole, 255), i)
        else:
            mean = 0
            if op == CONTRAST:
                total = tl.zeros((BLOCK,), tl.int32)
                for start in tl.range(0, PIXELS, BLOCK):
                    pixel = start + tl.arange(0, BLOCK)
                    mask = pixel < PIXELS
                    red = tl.load(source + 3 * pixel, mask=mask, other=0).to(tl.int32)
                    green = tl.load(source + 3 * pixel + 1, mask=mask, other=0).to(tl.int32)
                    blue = tl.load(source + 3 * pixel + 2, mask=mask, other=0).to(tl.int32)
                    total += tl.where(mask, gray(red, green, blue), 0)
                pixels = tl.cast(PIXELS, tl.int64)
                mean = ((2 * tl.sum(total.to(tl.int64)) + pixels) // (2 * pixels)).to(tl.int32)
            value = blend(tl.full((256,), 0, tl.int32) + mean, i, amount.to(tl.float32))
        tl.store(tables + (sample.to(tl.int64) * 3 + channel) * 256 + i, value.to(tl.uint8))
