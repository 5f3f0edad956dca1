"""Hugging Face's parquet shards of images: a column `image` of {bytes, path} and a column `label` of integers.

Wants the extra deitfast[parquet]. Images lie packed inside row groups: reading them in order is cheap, in random order
it is not, so `deitfast data prepare` makes tar shards of them.
"""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deitfast.errors import DeitfastError, first_line

_COLUMNS = ("image", "label")
_lock = threading.Lock()


def read_rows(path: Path) -> tuple[list[tuple[str, int | None]], tuple[str, ...] | None]:
    """(name, label) of a file's images, None for no label, which test sets give as -1; the class names, if stated."""
    file = _open(path)
    rows: list[tuple[str, int | None]] = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["image.path", "label"])
        paths = [(row or {}).get("path") or "" for row in table.column("image").to_pylist()]
        names = [Path(name).name or f"{len(rows) + i:08d}" for i, name in enumerate(paths)]
        labels = (None if label in (None, -1) else int(label) for label in table.column("label").to_pylist())
        rows += zip(names, labels, strict=True)
    return rows, _class_names(file.schema_arrow.metadata)


def read_row(path: str, row: int) -> np.ndarray:
    """The encoded bytes of image number `row` of a file. Raises OSError."""
    with _lock:  # one row group at a time is unpacked, and the next readers want the same
        starts = _starts(path)
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if row < 0 or group >= len(starts) - 1:
            return np.zeros(0, np.uint8)
        data = _group(path, group)[row - int(starts[group])]
    return np.frombuffer(bytearray(data), np.uint8)


@lru_cache(maxsize=512)
def _starts(path: str) -> np.ndarray:
    """First row of each row group, and the number of rows."""
    metadata = _open(Path(path)).metadata
    return np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])


@lru_cache(maxsize=2)
def _group(path: str, group: int) -> list[bytes]:
    table = _open(Path(path)).read_row_group(group, columns=["image.bytes"])
    return [(row or {}).get("bytes") or b"" for row in table.column("image").to_pylist()]


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DeitfastError(f"{path} is a parquet file. Reading it needs pip install 'deitfast[parquet]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DeitfastError(f"{path} cannot be read as parquet: {first_line(error)}. Download it again") from error
    missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise DeitfastError(f"{path} has no column {missing[0]}; it has {', '.join(file.schema_arrow.names)}")
    return file


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """The names that Hugging Face's `ClassLabel` writes into a file's schema."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(map(str, names)) if names else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
