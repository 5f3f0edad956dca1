"""The augmentations by their definitions: timm's functions, PIL and torchvision, one PIL image at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from deitfast.data.augmentation_draws import OPS, AugmentationDraws
from tests.reference import import_timm, import_torchvision

FILL = (124, 116, 104)  # timm's img_mean of ImageNet, in 0..255
TIMM_NAMES = {
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "solarize add": "SolarizeAdd",
    "color": "Color",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear x": "ShearX",
    "shear y": "ShearY",
    "translate x": "TranslateXRel",
    "translate y": "TranslateYRel",
}
"""Our names of the fifteen operations, and timm's."""


def timm_op(name: str, image: Image.Image, amount: float) -> Image.Image:
    """timm's operation at a given amount. Posterize to 0 bits is black, which Pillow 13 refuses to do."""
    import_timm()
    from timm.data import auto_augment

    if name == "posterize" and amount < 1:
        return Image.new("RGB", image.size)
    whole = name in ("posterize", "solarize", "solarize add")
    arguments = () if name in ("autocontrast", "equalize", "invert") else (int(amount) if whole else amount,)
    operation: Any = auto_augment.NAME_TO_OP[TIMM_NAMES[name]]
    return operation(image, *arguments, fillcolor=FILL, resample=Image.Resampling.BICUBIC)


def deit_op(name: str, image: Image.Image, amount: float) -> Image.Image:
    """An operation of 3-Augment or of torchvision's colour jitter."""
    adjust = import_torchvision().transforms.functional
    if name == "grayscale":
        return adjust.to_grayscale(image, num_output_channels=3)
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(radius=amount))
    if name == "solarize":
        assert amount == 128
        return ImageOps.solarize(image)
    jitter = {"brightness": adjust.adjust_brightness, "contrast": adjust.adjust_contrast}
    return (jitter | {"color": adjust.adjust_saturation})[name](image, amount)


def apply_one(x: np.ndarray, name: str, amount: float) -> np.ndarray:
    """One operation of one image, uint8 (H, W, 3)."""
    operation = deit_op if name in ("grayscale", "blur") else timm_op
    return np.asarray(operation(name, Image.fromarray(x), float(amount)))


def apply(images: np.ndarray, draws: AugmentationDraws) -> np.ndarray:
    """What a policy should make of images, uint8 (m, H, W, 3)."""
    out = images.copy()
    for i, (ops, amounts) in enumerate(zip(draws.ops.tolist(), draws.amounts.tolist(), strict=True)):
        for op, amount in zip(ops, amounts, strict=True):
            if op:
                out[i] = apply_one(out[i], OPS[op], amount)
    return out
