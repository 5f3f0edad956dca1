"""Turn scikit-learn's copy of the UCI digits into train.tar and val.tar, beside this file.

    python deitfast/data/digits/make_digits.py

Every fifth image goes to val.tar. The 8 x 8 images with 17 grey levels become 16 x 16 grayscale JPEGs (each pixel a
2 x 2 block, level 16 white). Names, order and times are fixed, so the same libraries write the same bytes.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from deitfast.data.files import add_member


def encode(image: np.ndarray) -> bytes:
    """An 8 x 8 image with values 0..16 as a 16 x 16 grayscale JPEG."""
    pixels = np.rint(image * (255 / 16)).astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, optimize=True)
    return buffer.getvalue()


def main() -> None:
    digits = load_digits()
    for split in ("train", "val"):
        path = Path(__file__).parent / f"{split}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
                if (i % 5 == 0) == (split == "val"):
                    add_member(tar, f"{label}/{i:04d}.jpg", encode(image))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
