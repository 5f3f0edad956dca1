"""Small folders of real JPEGs made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own: the folder of its manifests."""
    monkeypatch.delenv("DEITFAST_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deitfast" / "manifests"


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random colour image: like a photograph, it survives JPEG, and every resize of it differs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    def make(name: str = "set", train: int = 6, val: int = 3, classes: tuple[str, ...] = ("ape", "bat", "cow")) -> Path:
        """`train` and `val` images a class, sizes from 40 to 90 pixels, odd ones among them."""
        root = tmp_path / name
        for split, count in (("train", train), ("val", val)):
            for c, label in enumerate(classes):
                folder = root / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    seed = 1000 * (split == "val") + 100 * c + i
                    picture(40 + 7 * i % 51, 41 + 13 * (i + c) % 50, seed).save(folder / f"{i:03d}.jpg", quality=95)
        return root

    return make
