"""A sequence of augmentations on a batch of uint8 images, each image with its own operations and amounts.

    images (m, H, W, 3) uint8, plan (slots, m, 8) fp64 -> out (m, H, W, 3) uint8

A slot is one operation a sample. Row plan[s, i]: its code (`CODES`), 1 if it is the sample's first operation, else 0,
and up to six amounts. A sample's operations stand in its last slots, after slots to "skip", in which nothing is done;
a sample without operations has a "none", a copy, in its last slot. So each sample is read and written once an
operation. Results equal PIL's in every bit.

A slot is two launches: `tables_kernel` writes the lookup table of the samples whose operation is one, with the
reduction over the image that it may need, and `image_ops_kernel` applies every operation but the blur, a launch for
each of its six passes, which may stand in the first slot only. Everything has a static shape, and nothing waits for
the device. Checked in Triton's interpreter; not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deitfast.kernels.blur import BLUR, blur_reference, box_kernel
from deitfast.kernels.common import Launch, check_last_contiguous, check_shape, has_data, launch, op, runs_triton
from deitfast.kernels.photometric import (
    AUTOCONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    LAST_TABLE,
    NONE,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
    blend,
    blend_reference,
    gray,
    gray_reference,
    look_up_reference,
    smooth,
    smooth_reference,
    source_of,
    tables_kernel,
    tables_reference,
)
from deitfast.kernels.replaced import replaceable
from deitfast.kernels.warp import AFFINE, affine, affine_reference

SKIP = tl.constexpr(-1)
COLUMNS = 8
"""Numbers in a row of the plan."""

CODES: dict[str, int] = {
    "skip": SKIP.value,
    "none": NONE.value,
    "autocontrast": AUTOCONTRAST.value,
    "equalize": EQUALIZE.value,
    "posterize": POSTERIZE.value,
    "solarize": SOLARIZE.value,
    "solarize add": SOLARIZE_ADD.value,
    "contrast": CONTRAST.value,
    "brightness": BRIGHTNESS.value,
    "color": COLOR.value,
    "sharpness": SHARPNESS.value,
    "affine": AFFINE.value,
    "blur": BLUR.value,
}
"""Operation codes by name, for whoever writes a plan."""

# A fused multiply-add would round once where PIL rounds twice.
TABLES_LAUNCH = Launch({"BLOCK": 2048}, num_warps=8, num_stages=2, fp_fusion=False)
APPLY_LAUNCH = Launch({"BLOCK": 256}, num_warps=8, num_stages=1, fp_fusion=False)
BOX_LAUNCH = Launch({"BLOCK": 1024}, num_warps=4, num_stages=1, fp_fusion=False)


def image_ops_reference(images: Tensor, plan: Tensor, fill: tuple[int, int, int], blurs: bool = False) -> Tensor:
    """The op in eager PyTorch, on any device; which samples an operation is for is asked of the device, so it waits."""
    out = images.clone()
    for slot in plan.to(images.device):
        op, amount = slot[:, 0].long(), slot[:, 2:]
        for name in ("table", "color", "sharpness", "affine", "blur"):
            if name == "table":
                chosen = (op > NONE.value) & (op <= LAST_TABLE.value)
            else:
                chosen = op == CODES[name]
            rows = chosen.nonzero()[:, 0]
            if not len(rows):
                continue
            x, by = out[rows], amount[rows]
            factor = by[:, 0, None, None, None]
            if name == "table":
                out[rows] = look_up_reference(x, tables_reference(x, op[rows], by[:, 0]))
            elif name == "color":
                out[rows] = blend_reference(gray_reference(x)[..., None], x, factor)
            elif name == "sharpness":
                out[rows] = blend_reference(smooth_reference(x), x, factor)
            elif name == "affine":
                out[rows] = affine_reference(x, by, fill)
            else:
                out[rows] = blur_reference(x, by[:, :3])
    return out


@triton.jit
def image_ops_kernel(
    images,  # (m, H, W, 3) uint8
    previous,  # (m, H, W, 3) uint8: what the slot before wrote
    plan,  # (m, 8) fp64: operation, whether it is the sample's first, amounts
    tables,  # (m, 3, 256) uint8
    out,  # (m, H, W, 3) uint8
    H,
    W,
    fill,  # 0xBBGGRR
    BLOCK: tl.constexpr,  # pixels
):
    sample = tl.program_id(1)
    row = plan + sample * 8
    op = tl.load(row).to(tl.int32)
    if (op != SKIP) & (op != BLUR):
        source = source_of(images, previous, tl.load(row + 1) != 0, sample, H * W)
        destination = out + sample.to(tl.int64) * H * W * 3
        start = tl.program_id(0) * BLOCK
        pixel = start + tl.arange(0, BLOCK)
        mask = pixel < H * W
        factor = tl.load(row + 2).to(tl.float32)
        if op == AFFINE:
            affine(source, destination, pixel, row + 2, fill, H, W, mask)
        elif op == COLOR:
            red = tl.load(source + 3 * pixel, mask=mask, other=0).to(tl.int32)
            green = tl.load(source + 3 * pixel + 1, mask=mask, other=0).to(tl.int32)
            blue = tl.load(source + 3 * pixel + 2, mask=mask, other=0).to(tl.int32)
            luma = gray(red, green, blue)
            tl.store(destination + 3 * pixel, blend(luma, red, factor).to(tl.uint8), mask=mask)
            tl.store(destination + 3 * pixel + 1, blend(luma, green, factor).to(tl.uint8), mask=mask)
            tl.store(destination + 3 * pixel + 2, blend(luma, blue, factor).to(tl.uint8), mask=mask)
        else:
            # These take bytes as they come, whatever their channel: three blocks, each contiguous.
            for third in tl.static_range(3):
                offset = 3 * start + third * BLOCK + tl.arange(0, BLOCK)
                inside = offset < 3 * H * W
                value = tl.load(source + offset, mask=inside, other=0).to(tl.int32)
                if op == SHARPNESS:
                    value = blend(smooth(source, offset, offset // 3, H, W, inside), value, factor)
                elif op != NONE:
                    table = tables + (sample.to(tl.int64) * 3 + offset % 3) * 256
                    value = tl.load(table + value, mask=inside, other=0).to(tl.int32)
                tl.store(destination + offset, value.to(tl.uint8), mask=inside)


@op("image_ops")
def _image_ops(images: Tensor, plan: Tensor, fill: list[int], blurs: bool) -> Tensor:
    out = torch.empty_like(images)
    if not runs_triton(images):
        return image_ops_reference(images, plan, (fill[0], fill[1], fill[2])) if has_data(images) else out
    slots, (m, H, W, _) = len(plan), images.shape
    if not images.numel():
        return out
    # Slots write to `out` and `other` in turn, the last to `out`; the blur goes through the one that is free.
    other = torch.empty_like(images) if slots > 1 or blurs else out
    tables = torch.empty((m, 3, 256), dtype=torch.uint8, device=images.device)
    previous, destination = (out, other) if slots % 2 == 0 else (other, out)
    pixels = triton.cdiv(H * W, APPLY_LAUNCH.tiles["BLOCK"])
    for s in range(slots):
        read = {"images": images, "previous": previous, "plan": plan[s], "tables": tables}
        launch(tables_kernel, (m, 3), TABLES_LAUNCH, **read, PIXELS=H * W)
        color = fill[0] | fill[1] << 8 | fill[2] << 16
        launch(image_ops_kernel, (pixels, m), APPLY_LAUNCH, **read, out=destination, H=H, W=W, fill=color)
        if blurs and s == 0:
            _blur(images, previous, plan[0], destination)
        previous, destination = destination, previous
    return out


def _blur(images: Tensor, scratch: Tensor, plan: Tensor, out: Tensor) -> None:
    """Blur the samples of the first slot that want it: three passes along x, three along y, the last into `out`."""
    m, H, W, _ = images.shape
    grid = (triton.cdiv(3 * H * W, BOX_LAUNCH.tiles["BLOCK"]), m)
    source = images
    for i in range(6):
        target = out if i % 2 else scratch
        launch(box_kernel, grid, BOX_LAUNCH, x=source, plan=plan, out=target, H=H, W=W, ALONG_X=i < 3)
        source = target


@replaceable(image_ops_reference)
def image_ops(images: Tensor, plan: Tensor, fill: tuple[int, int, int], blurs: bool = False) -> Tensor:
    """Apply each sample's operations: uint8 (m, H, W, 3) -> a new tensor like it.

    plan: float64 (slots, m, 8), described above, on the images' device. fill: what warps put outside the image, RGB.
    blurs: whether any operation of the first slot is "blur". Raises TypeError for dtypes, ValueError for shapes.
    """
    if images.dtype != torch.uint8 or plan.dtype != torch.float64:
        raise TypeError(f"image_ops: images are {images.dtype} and plan {plan.dtype}, expected uint8 and float64")
    if images.ndim != 4 or images.shape[-1] != 3 or not images.is_contiguous():
        raise ValueError(f"image_ops: images have shape {tuple(images.shape)} and strides {images.stride()}, "
                         "expected contiguous (m, H, W, 3)")  # fmt: skip
    check_shape("image_ops", "plan", plan, (len(plan), len(images), COLUMNS))
    check_last_contiguous("image_ops", "plan", plan)
    if not len(plan):
        raise ValueError("image_ops: plan has no slots")
    if plan.device != images.device:
        raise ValueError(f"image_ops: plan is on {plan.device} but images on {images.device}; move one of them")
    return _image_ops(images, plan.contiguous(), list(fill), blurs)
