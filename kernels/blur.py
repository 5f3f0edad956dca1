"""Gaussian blur of uint8 images, equal to PIL's in every bit: three box filters along x, then three along y.

    box(v)[i] = (w0 v[i] + w1 (v[i-1] + v[i+1]) + w2 (v[i-2] + v[i+2]) + 2**23) >> 24        border repeated

The weights are integers in units of 2**-24 (w0 + 2 w1 + 2 w2 <= 2**24). Every pass rounds to 0..255, so none can be
folded into another: a launch each. Definition: Pillow, `libImaging/BoxBlur.c`, for boxes of at most five pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLUR = tl.constexpr(11)  # amounts: w0, w1, w2


def blur_reference(x: Tensor, weights: Tensor) -> Tensor:
    """Blur images uint8 (m, H, W, 3) with weights (m, 3): w0, w1, w2 of each."""
    w0, w1, w2 = weights.to(x.device).long()[:, :, None, None, None].unbind(1)
    out = x.long()
    for axis in (2, 2, 2, 1, 1, 1):
        i = torch.arange(x.shape[axis], device=x.device)
        before1, before2, after1, after2 = (
            out.index_select(axis, (i + k).clamp(0, len(i) - 1)) for k in (-1, -2, 1, 2)
        )
        out = (w0 * out + w1 * (before1 + after1) + w2 * (before2 + after2) + (1 << 23)) >> 24
    return out.to(torch.uint8)


@triton.jit
def box_kernel(
    x,  # (m, H, W, 3) uint8
    plan,  # (m, 8) fp64: operation, an unused number, amounts
    out,  # (m, H, W, 3) uint8, not x; written where the operation is BLUR
    H,
    W,
    ALONG_X: tl.constexpr,
    BLOCK: tl.constexpr,  # bytes
):
    sample = tl.program_id(1)
    row = plan + sample * 8
    if tl.load(row).to(tl.int32) == BLUR:
        image = sample.to(tl.int64) * H * W * 3
        w0, w1, w2 = tl.load(row + 2).to(tl.int64), tl.load(row + 3).to(tl.int64), tl.load(row + 4).to(tl.int64)
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < 3 * H * W
        if ALONG_X:
            place, last, stride = offset // 3 % W, W - 1, 3
        else:
            place, last, stride = offset // (3 * W), H - 1, 3 * W
        line = x + image + offset - place * stride
        value = tl.load(x + image + offset, mask=mask, other=0).to(tl.int64)
        before = tl.load(line + tl.maximum(place - 1, 0) * stride, mask=mask, other=0).to(tl.int64)
        after = tl.load(line + tl.minimum(place + 1, last) * stride, mask=mask, other=0).to(tl.int64)
        total = w0 * value + w1 * (before + after)
        before = tl.load(line + tl.maximum(place - 2, 0) * stride, mask=mask, other=0).to(tl.int64)
        after = tl.load(line + tl.minimum(place + 2, last) * stride, mask=mask, other=0).to(tl.int64)
        total += w2 * (before + after)
        result = (total + (1 << 23)) >> 24
        tl.store(out + image + offset, result.to(tl.uint8), mask=mask)
