"""A training batch as the network reads it: uint8 images to normalised, erased, mixed patches, in one pass.

    x = (images / 255 - mean) / std                          per channel
    x = N(0, 1) noise inside the sample's erase rectangle    a normal for each pixel and channel
    x = own * x + (1 - own) * partner                        partner: the neighbour in the pair, row xor 1
    out[b, p] = the pixels of patch p of x[b], in the order of `conv.weight.flatten(1)`: channel, y, x

images (m, H, W, 3) uint8 -> out (m, H / patch * W / patch, 3 * patch * patch). own is lam of the sample (mixup), or,
where its mix rectangle is not empty, 0 inside it and 1 outside (cutmix). The partner is erased before it is mixed in.
Arithmetic is fp32, rounded once. Everything that changes from step to step is a tensor, so a CUDA graph can replay it.

The noise of pixel i = y * W + x is the Philox4x32-10 block with counter (index, epoch, view, NOISE << 24 | i) under the
key `seed`: Box-Muller on the words 0 and 1 gives red and green, on 2 and 3 blue. It depends on the sample alone, not on
its row or on the batch. (Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)

A program takes the same pixels of both images of a pair and writes both, so each byte is read once and each normal
drawn once; where none of its pixels is erased it skips the draws. No gradient: the input of a network needs none.
Not yet measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.common import DTYPES, INTERPRETED, Launch, check_shape, has_data, launch, op, runs_triton
from deitfast.kernels.replaced import replaceable

NOISE = 4
"""Stream of the erasing noise in the fourth counter word."""

_STREAM = tl.constexpr(NOISE << 24)
_MASK = 0xFFFFFFFF
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # of Philox4x32

LAUNCH = Launch({"BLOCK": 512}, num_warps=4, num_stages=1)
"""512 pixels a program divide 224 x 224 and 384 x 384 evenly. One entry for every chip: no matrix work here."""

# Reference -----------------------------------------------------------------------------------------------------------


def _normals(index: Tensor, epoch: Tensor, view: Tensor, pixel: Tensor, seed: int) -> Tensor:
    """The noise of pixels in float64, (..., 3); index, epoch, view and pixel are int64 and broadcast to (...)."""
    c0, c1, c2, c3 = (c & _MASK for c in (index, epoch, view, pixel | NOISE << 24))
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # a signed overflow wraps and leaves all 64 bits right
        c0, c2 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, ((p0 >> 32) ^ c3 ^ k1) & _MASK
        c1, c3 = p1, p0  # their upper halves are masked out when they are used
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    u0, u1, u2, u3 = ((word >> 8).double() * 2.0**-24 for word in (c0, c1 & _MASK, c2, c3 & _MASK))
    radius, other = (torch.sqrt(-2 * torch.log(1 - u)) for u in (u0, u2))
    angle = 2 * math.pi * u1
    return torch.stack([radius * angle.cos(), radius * angle.sin(), other * (2 * math.pi * u3).cos()], dim=-1)


def _inside(box: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Whether pixels lie in rectangles (top, left, height, width): box (m, 4), y (H, 1), x (W,) -> bool (m, H, W)."""
    top, left, height, width = (part[:, None, None] for part in box.unbind(1))
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def _scale_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """The normalisation of a byte as byte * scale + shift, per channel."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _patchify(x: Tensor, patch_size: int) -> Tensor:
    """(m, H, W, 3) -> (m, H / patch, W / patch, 3, patch, patch), a view."""
    m, H, W, _ = x.shape
    return x.view(m, H // patch_size, patch_size, W // patch_size, patch_size, 3).permute(0, 1, 3, 5, 2, 4)


def input_patches_reference(
    images: Tensor, erase: Tensor, mix_box: Tensor, lam: Tensor, index: Tensor, view: Tensor, epoch: Tensor, *,
    seed: int, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, mixes: bool,
) -> Tensor:  # fmt: skip
    """The op in eager PyTorch, on the whole batch, with noise drawn for every pixel; in float64 for that dtype."""
    H, W = images.shape[1:3]
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    scale, shift = (
        torch.stack(
            [torch.full((), value, dtype=precision, device=images.device) for value in values]
        )  # fit for a graph
        for values in _scale_shift(mean, std)
    )
    x = images.to(precision) * scale + shift
    row, column = (torch.arange(n, device=images.device) for n in (H, W))
    of_sample = (index[:, None, None], epoch, view[:, None, None])
    noise = _normals(*of_sample, row[:, None] * W + column, seed)
    x = torch.where(_inside(erase, row[:, None], column)[..., None], noise.to(precision), x)
    if mixes:
        cut = (mix_box[:, 2] * mix_box[:, 3] > 0)[:, None, None]
        outside = ~_inside(mix_box, row[:, None], column)
        own = torch.where(cut, outside.to(precision), lam.to(precision)[:, None, None])[..., None]
        x = own * x + (1 - own) * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return _patchify(x, patch_size).flatten(3).flatten(1, 2).to(dtype)


# CPU -----------------------------------------------------------------------------------------------------------------


def _input_cpu(
    images: Tensor, erase: Tensor, mix_box: Tensor, lam: Tensor, index: Tensor, view: Tensor, epoch: Tensor,
    out: Tensor, seed: int, patch_size: int, mean: Sequence[float], std: Sequence[float], mixes: bool,
) -> None:  # fmt: skip
    """Fill `out`, a pair at a time, so that its images stay in the cache; rectangles are cut, not masked."""
    m, H, W, _ = images.shape
    scale, shift = (torch.tensor(values).repeat(W) for values in _scale_shift(mean, std))  # whole rows vectorise
    pixel = torch.arange(H * W).view(H, W)
    erase_boxes, mix_boxes, weights = erase.tolist(), mix_box.tolist(), lam.tolist()
    patches = out.view(m, H // patch_size, W // patch_size, 3, patch_size, patch_size)
    step = 2 if mixes else 1
    for first in range(0, m, step):
        pair = slice(first, first + step)
        x = images[pair].to(torch.float32).view(-1, H, 3 * W).mul_(scale).add_(shift).view(-1, H, W, 3)
        for k in range(step):
            top, left, height, width = erase_boxes[first + k]
            if height * width > 0:
                part = (slice(top, top + height), slice(left, left + width))
                sample = slice(first + k, first + k + 1)
                x[k][part] = _normals(index[sample], epoch, view[sample], pixel[part], seed).to(torch.float32)
        if mixes:
            x = _mix_pair(x, mix_boxes[pair], weights[pair])
        patches[pair] = _patchify(x, patch_size)


def _mix_pair(x: Tensor, boxes: Sequence[Sequence[int]], lam: Sequence[float]) -> Tensor:
    """x (2, H, W, 3), the two images of a pair, each mixed with the other."""
    mixed = torch.empty_like(x)
    for k, (top, left, height, width) in enumerate(boxes):
        own, partner = x[k], x[1 - k]
        if height * width > 0:
            part = (slice(top, top + height), slice(left, left + width))
            mixed[k] = own
            mixed[k][part] = partner[part]
        else:
            torch.mul(own, lam[k], out=mixed[k]).add_(partner * (1 - lam[k]))
    return mixed


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def noise_words(seed, index, epoch, view, pixel):
    """The Philox block of each pixel: four uint32 tensors like `pixel` (int32); the others are integer scalars."""
    block = (pixel | _STREAM).to(tl.uint32)
    return tl.philox(seed, index.to(tl.uint32), epoch.to(tl.uint32), view.to(tl.uint32), block)


@triton.jit
def _cos_sin(turn):
    """cos and sin of 2 pi turn, turn a multiple of 2**-24 in [0, 1): within 2**-23 of the true values.

    The eighth of a turn that is left after whole quarters is exact in fp32, and Taylor's series to degree 9 is enough
    for it. (The library's cos reduces any argument, through an array in local memory.)
    """
    quarter = tl.floor(4.0 * turn + 0.5)
    angle = (turn - 0.25 * quarter) * 6.283185307179586
    z = angle * angle
    cosine = 1.0 + z * (-0.5 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    sine = angle * (1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    k = quarter.to(tl.int32)
    odd = (k & 1) == 1
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((k + 1) & 2) == 2, -x, x), tl.where((k & 2) == 2, -y, y)


@triton.jit
def _unit(word):
    """A 32-bit word as a multiple of 2**-24 in [0, 1)."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _radius(word):
    return tl.sqrt(-2.0 * tl.log(1.0 - _unit(word)))


@triton.jit
def _in_box(box, row, y, x):
    """Whether pixels lie in the rectangle box[row] = (top, left, height, width)."""
    top, left = tl.load(box + row * 4).to(tl.int32), tl.load(box + row * 4 + 1).to(tl.int32)
    height, width = tl.load(box + row * 4 + 2).to(tl.int32), tl.load(box + row * 4 + 3).to(tl.int32)
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


@triton.jit
def _load_pixels(images, first, mask, scale, shift):
    """Red, green and blue of pixels whose bytes start at `first`, normalised, fp32."""
    red = tl.load(images + first, mask=mask, other=0).to(tl.float32) * scale[0] + shift[0]
    green = tl.load(images + first + 1, mask=mask, other=0).to(tl.float32) * scale[1] + shift[1]
    blue = tl.load(images + first + 2, mask=mask, other=0).to(tl.float32) * scale[2] + shift[2]
    return red, green, blue


@triton.jit
def _erase_pixels(red, green, blue, erase, index, view, epoch, seed, row, pixel, y, x):
    """The pixels of `row`, those inside its rectangle replaced by noise."""
    erased = _in_box(erase, row, y, x)
    if tl.max(erased.to(tl.int32), 0) > 0:
        w0, w1, w2, w3 = noise_words(seed, tl.load(index + row), tl.load(epoch), tl.load(view + row), pixel)
        radius, other_radius = _radius(w0), _radius(w2)
        cosine, sine = _cos_sin(_unit(w1))
        red = tl.where(erased, radius * cosine, red)
        green = tl.where(erased, radius * sine, green)
        blue = tl.where(erased, other_radius * _cos_sin(_unit(w3))[0], blue)
    return red, green, blue


@triton.jit
def _own_weight(mix_box, lam, row, y, x):
    """Weight of the own image in the mixture at the pixels, fp32."""
    is_cut = tl.load(mix_box + row * 4 + 2) * tl.load(mix_box + row * 4 + 3) > 0
    return tl.where(is_cut, tl.where(_in_box(mix_box, row, y, x), 0.0, 1.0), tl.load(lam + row))


@triton.jit
def _store_pixels(out, row, size, offset, mask, AREA: tl.constexpr, red, green, blue):
    first = out + row * size * 3 + offset
    tl.store(first, red.to(out.dtype.element_ty), mask=mask)
    tl.store(first + AREA, green.to(out.dtype.element_ty), mask=mask)
    tl.store(first + 2 * AREA, blue.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed"])
def input_patches_kernel(
    images,  # (m, height, width, 3) uint8
    erase,  # (m, 4) int64
    mix_box,  # (m, 4) int64
    lam,  # (m,) fp32
    index,  # (m,) int64
    view,  # (m,) int64
    epoch,  # (1,) int64
    out,  # (m, patches, 3 * PATCH * PATCH)
    seed,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    height,
    width,
    PATCH: tl.constexpr,
    MIXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    size = height * width
    tiles = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    # Pixels in the order of the output: patch by patch, within it row by row.
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    AREA: tl.constexpr = PATCH * PATCH
    patch, inner = place // AREA, place % AREA
    patches_x = width // PATCH
    y = patch // patches_x * PATCH + inner // PATCH
    x = patch % patches_x * PATCH + inner % PATCH
    pixel, offset = y * width + x, patch * (3 * AREA) + inner
    scale, shift = (scale_red, scale_green, scale_blue), (shift_red, shift_green, shift_blue)

    if MIXES:
        row *= 2
    first = row * size * 3 + pixel * 3
    r, g, b = _load_pixels(images, first, mask, scale, shift)
    if MIXES:  # read both before either waits for its rectangle
        other_r, other_g, other_b = _load_pixels(images, first + size * 3, mask, scale, shift)
    r, g, b = _erase_pixels(r, g, b, erase, index, view, epoch, seed, row, pixel, y, x)
    if MIXES:
        other_r, other_g, other_b = _erase_pixels(
            other_r, other_g, other_b, erase, index, view, epoch, seed, row + 1, pixel, y, x
        )
        w = _own_weight(mix_box, lam, row, y, x)
        v = 1.0 - w
        _store_pixels(out, row, size, offset, mask, AREA, w * r + v * other_r, w * g + v * other_g, w * b + v * other_b)
        w = _own_weight(mix_box, lam, row + 1, y, x)
        v = 1.0 - w
        _store_pixels(
            out, row + 1, size, offset, mask, AREA, w * other_r + v * r, w * other_g + v * g, w * other_b + v * b
        )
    else:
        _store_pixels(out, row, size, offset, mask, AREA, r, g, b)


# The op --------------------------------------------------------------------------------------------------------------


@op("input_patches")
def _input_patches(
    images: Tensor, erase: Tensor, mix_box: Tensor, lam: Tensor, index: Tensor, view: Tensor, epoch: Tensor,
    seed: int, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, mixes: bool,
) -> Tensor:  # fmt: skip
    m, H, W, _ = images.shape
    patches, values = (H // patch_size) * (W // patch_size), 3 * patch_size * patch_size
    out = torch.empty((m, patches, values), dtype=dtype, device=images.device)
    if not runs_triton(images):
        if has_data(images):
            _input_cpu(images, erase, mix_box, lam, index, view, epoch, out, seed, patch_size, mean, std, mixes)
        return out
    # Triton's interpreter pays for every operation, whatever the size of its tensors: there a program takes it all.
    entry = replace(LAUNCH, tiles={"BLOCK": triton.next_power_of_2(H * W)}) if INTERPRETED else LAUNCH
    scale, shift = _scale_shift(mean, std)
    red, green, blue = zip(scale, shift, strict=True)
    launch(
        input_patches_kernel,
        ((m // 2 if mixes else m) * triton.cdiv(H * W, entry.tiles["BLOCK"]),),
        entry,
        images=images,
        erase=erase,
        mix_box=mix_box,
        lam=lam,
        index=index,
        view=view,
        epoch=epoch,
        out=out,
        seed=seed,
        scale_red=red[0],
        shift_red=red[1],
        scale_green=green[0],
        shift_green=green[1],
        scale_blue=blue[0],
        shift_blue=blue[1],
        height=H,
        width=W,
        PATCH=patch_size,
        MIXES=mixes,
    )
    return out


@replaceable(input_patches_reference)
def input_patches(
    images: Tensor, erase: Tensor, mix_box: Tensor, lam: Tensor, index: Tensor, view: Tensor, epoch: Tensor, *,
    seed: int, patch_size: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, mixes: bool,
) -> Tensor:  # fmt: skip
    """Patches (m, H / patch_size * W / patch_size, 3 * patch_size**2) of `dtype` of a training batch.

    images: uint8 (m, H, W, 3), contiguous, H and W multiples of patch_size, pixels. m is even where `mixes`.
    erase, mix_box: int64 (m, 4), rectangles (top, left, height, width) inside the image; of no area: none.
    lam: float32 (m,), weight of the own image where its mix_box is empty; lam and mix_box count only where `mixes`.
    index, view: int64 (m,), epoch: int64 (1,), seed: 0 to 2**63 - 1: what the noise is drawn for.
    mean, std: of the three channels, in [0, 1].
    Raises ValueError for shapes, strides, devices and values that do not fit, TypeError for dtypes.
    """
    op = "input_patches"
    if images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{op}: images have shape {tuple(images.shape)}, expected (m, H, W, 3)")
    m, H, W, _ = images.shape
    if patch_size < 1 or H % patch_size or W % patch_size:
        raise ValueError(f"{op}: images of {H} x {W} pixels do not divide into patches of {patch_size}; resize them")
    if H * W > 1 << 24:
        raise ValueError(f"{op}: images of {H} x {W} pixels are too large; the noise has counters for 2**24 pixels")
    if mixes and m % 2:
        raise ValueError(f"{op}: {m} images do not make pairs to mix; take an even number")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{op}: seed {seed} is not in [0, 2**63)")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype {dtype}; supported are bfloat16, float16 and float32")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{op}: mean {tuple(mean)} and std {tuple(std)} need a value for each of the three channels")
    rows = {"erase": (m, 4), "mix_box": (m, 4), "lam": (m,), "index": (m,), "view": (m,), "epoch": (1,)}
    given = {"images": images, "erase": erase, "mix_box": mix_box, "lam": lam, "index": index, "view": view}
    for name, tensor in (given | {"epoch": epoch}).items():
        check_shape(op, name, tensor, rows.get(name, (m, H, W, 3)))
        expected = {"images": torch.uint8, "lam": torch.float32}.get(name, torch.int64)
        if tensor.dtype != expected:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected {expected}")
        if tensor.device != images.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but images on {images.device}; move one of them")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; call .contiguous()")
    return _input_patches(
        images, erase, mix_box, lam, index, view, epoch, seed, patch_size, list(mean), list(std), dtype, mixes
    )
