"""The policy's CPU route against timm's and torchvision's functions on PIL images: equal in every bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitfast.data import cpu_ops
from deitfast.data.augmentation_draws import OP, OPS
from tests import augment_reference
from tests.kernels.test_image_ops import amounts, pictures


@pytest.mark.parametrize("name", OPS[1:])
@pytest.mark.parametrize("size", [(67, 90), (96, 96), (3, 4), (2, 5), (1, 1)], ids=str)
def test_every_operation_is_pils(name, size):
    for image in pictures(*size):
        for amount in amounts(OP[name], 12).tolist():
            given = image.copy()
            out = cpu_ops.apply_one(given, OP[name], amount, augment_reference.FILL)
            assert np.array_equal(out, augment_reference.apply_one(image, name, amount)), amount
            assert np.array_equal(given, image), "the input was written to"


def test_photographs(shared_data: Path):
    files = sorted((shared_data / "imagenet-sample").glob("*/*.JPEG"))[:12]
    for i, file in enumerate(files):
        image = np.asarray(Image.open(file).convert("RGB").resize((160, 160)))
        for name in OPS[1:]:
            amount = float(amounts(OP[name], 12)[i])
            out = cpu_ops.apply_one(image, OP[name], amount, augment_reference.FILL)
            assert np.array_equal(out, augment_reference.apply_one(image, name, amount)), (name, amount)
