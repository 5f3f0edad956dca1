"""CIFAR-10 as its authors publish it: pixels without files, made into tar shards of images once, in the cache.

    cifar-10-python.tar.gz, or cifar-10-batches-py/ unpacked      a pickled dictionary a batch
    cifar-10-binary.tar.gz, or cifar-10-batches-bin/ unpacked     3,073 bytes an image: label, red, green, blue

Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images", and https://www.cs.toronto.edu/~kriz/cifar.html.
A shard holds BMPs: their bytes follow from the pixels alone, so the checksums of a run fit shards made anew.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deitfast.data.files import add_member
from deitfast.data.manifest import digest
from deitfast.errors import DeitfastError, first_line
from deitfast.files import cache_folder, write_atomically

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""In label order, which is that of their names."""

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_PACKED = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_UNPACKED = ("cifar-10-batches-py", "cifar-10-batches-bin")
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}
_REMEDY = f"Download {_PACKED[0]} again"

# What a pickled numpy array of any age and a bytes object of Python 3 are made of; nothing else is ever called.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


def find(path: Path) -> Path | None:
    """CIFAR-10's archive or folder of batches at `path` or right below it; None without one, or beside a train/."""
    if path.is_file():
        return path if path.name in _PACKED else None
    if path.name in _UNPACKED or (path / "train").exists():
        return path if path.name in _UNPACKED else None
    return next((path / name for name in (*_UNPACKED, *_PACKED) if (path / name).exists()), None)


def shards(source: Path) -> Path:
    """The folder with train.tar and val.tar made of what `find` found; made now where the cache has none.

    Raises DeitfastError for a batch that is missing or holds something else, and where the cache cannot be written.
    """
    source = source.resolve()
    inside = sorted(p.name for p in source.iterdir()) if source.is_dir() else []
    folder = cache_folder("cifar10") / digest(source if inside else source.parent, inside or [source.name])
    missing = {split: names for split, names in _BATCHES.items() if not (folder / f"{split}.tar").exists()}
    if missing:
        read = {split: [_batch(source, name) for name in names] for split, names in missing.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split, batches in read.items():
                write_atomically(folder / f"{split}.tar", partial(_write, batches))
        except OSError as error:
            raise DeitfastError(
                f"cannot write {folder}: {error.strerror}. Set DEITFAST_HOME to another disk"
            ) from error
    return folder


def _batch(source: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (n, 32, 32, 3) and labels uint8 (n,) of one batch."""
    try:
        data = _read(source, name)
        pixels, labels = _of_binary(data) if "bin" in source.name else _of_pickle(data)
    except DeitfastError:
        raise
    except Exception as error:  # tar, gzip, pickle and numpy raise many kinds on damage
        raise DeitfastError(f"{name} of {source} is not a batch of CIFAR-10: {first_line(error)}. {_REMEDY}") from error
    if pixels.ndim != 2 or pixels.shape[1] != _PIXELS or pixels.dtype != np.uint8 or len(pixels) != len(labels):
        raise DeitfastError(
            f"{name} of {source} holds {pixels.dtype} {pixels.shape}, not (n, {_PIXELS}) bytes. {_REMEDY}"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise DeitfastError(f"{name} of {source} has labels beyond the {len(CLASSES)} classes. {_REMEDY}")
    return pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), labels


def _read(source: Path, name: str) -> bytes:
    file = name + ".bin" * ("bin" in source.name)
    if source.is_dir():
        return (source / file).read_bytes()
    with tarfile.open(source, "r:gz") as tar:
        member = next((m for m in tar if m.isreg() and Path(m.name).name == file), None)
        found = tar.extractfile(member) if member else None
        if found is None:
            raise DeitfastError(f"{source} holds no {file}. {_REMEDY}")
        return found.read()


def _of_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], rows[:, 0]


def _of_pickle(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    found = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    return np.asarray(found[b"data"]), np.asarray(found[b"labels"], np.int64)


class _Unpickler(pickle.Unpickler):
    """Reads arrays, lists, dictionaries and text, and refuses whatever else a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR-10 needs")
        return super().find_class(module, name)


def _write(batches: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """A tar of the images, each in its class's folder, numbered through the batches."""
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    with tarfile.open(path, "w") as tar:
        for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(image)).save(buffer, "BMP")
            add_member(tar, f"{CLASSES[label]}/{number:05d}.bmp", buffer.getvalue())
