"""The scan: every image of a split decoded once, so that what is damaged is known before the first step.

A damaged image costs nothing here and hours in the middle of a run: what does not decode is named and left out.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deitfast.data.cores import cores
from deitfast.data.manifest import FORMATS, MAX_BYTES, Manifest, checksum, most_pixels, name_of, strings
from deitfast.data.parquet import read_row
from deitfast.errors import say

_PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # those whose pixels DALI gives as PIL does
_LARGE = 25_000_000  # pixels; of more, one image is decoded at a time, for the memory it takes
_LARGE_ONES = threading.Lock()
_NAMED = 10  # damaged files named on stderr; the rest is counted


class Entry(NamedTuple):
    """An image as names and headers tell of it."""

    file: int
    member: str = ""  # name inside a shard, empty for a plain file
    offset: int = 0  # bytes; in a parquet file the row
    length: int = -1  # bytes; -1: the whole file
    label: int | None = None  # as stated, where an integer is
    class_name: str = ""  # as stated, where a name is


@dataclass(frozen=True)
class Entries:
    """Images to scan. files: paths relative to the root. labels: of the images, into classes."""

    files: Sequence[str]
    images: Sequence[Entry]
    labels: Sequence[int]
    classes: tuple[str, ...]
    bad: Sequence[tuple[str, str]] = ()  # (name, reason) of what was seen to be damaged already


class Facts(NamedTuple):
    """What a scan learns of one image, as a manifest names it: a row of an array of `FACTS`."""

    length: int
    width: int
    height: int
    checksum: int
    format: int
    convert: bool


FACTS = np.dtype(list(zip(Facts._fields, ("i8", "i8", "i8", "u8", "u1", "?"), strict=True)))


def columns(facts: np.ndarray) -> dict[str, Any]:
    """The arrays of a manifest that hold these facts, of dtype `FACTS`."""
    return {name: facts[name].copy() for name in Facts._fields}


def inspect_image(data: bytes, whole: bool = True) -> Facts:
    """The facts of an encoded image; ValueError with the reason if it does not decode.

    whole: decode all of it, not only its header.
    """
    from PIL import Image

    if not data:
        raise ValueError("empty file")
    most = most_pixels()
    too_many = f"more than {most / 1e6:.4g} million pixels. Reduce it, or set DEITFAST_MAX_PIXELS"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > most:
                raise ValueError(f"{width} x {height} pixels: {too_many}")
            deep = image.format == "PNG" and data[24] == 16  # the header's bit depth, which PIL's mode may hide
            kind = image.format if image.format in FORMATS else "JPEG"  # MPO is JPEG with further images behind
            convert = image.mode not in _PLAIN_MODES or deep
            facts = Facts(len(data), width, height, checksum(data), FORMATS.index(kind), convert)
            if whole:
                with _LARGE_ONES if width * height > _LARGE else contextlib.nullcontext():
                    image.load()
    except ValueError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit is higher, but met first
        raise ValueError(too_many) from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, BMP or WebP image") from None
    except Exception as error:  # Pillow's decoders raise many kinds; each of them means the file is not usable
        raise ValueError(str(error) or type(error).__name__) from error
    return facts


def scan(root: Path, entries: Entries, quiet: bool = False) -> Manifest:
    """Decode every entry, in threads; those that fail go to `bad`. Progress goes to stderr once it takes a while."""
    images = entries.images
    n = len(images)

    def look(image: Entry) -> Facts | str:
        path, offset, length = root / entries.files[image.file], image.offset, image.length
        try:
            if path.suffix == ".parquet":
                return inspect_image(read_row(str(path), offset).tobytes())
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = size if length < 0 else length
                if offset + length > size:  # before memory is taken for what is not there
                    return f"truncated: {max(size - offset, 0)} of {length} bytes"
                if length > MAX_BYTES:
                    return f"{length} bytes: more than {MAX_BYTES}"
                f.seek(offset)
                return inspect_image(f.read(length))
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    facts, good = np.zeros(n, FACTS), np.zeros(n, bool)
    bad: list[tuple[str, str]] = list(entries.bad)
    with progress(f"checking {root}", n, quiet) as tick, ThreadPoolExecutor(cores()) as pool:
        for start in range(0, n, 4096):  # a bounded number of tasks at a time
            for i, found in enumerate(pool.map(look, images[start : start + 4096]), start):
                if isinstance(found, str):
                    name = name_of(entries.files[images[i].file], images[i].member)
                    bad.append((name, " ".join(found.split())))
                else:
                    good[i], facts[i] = True, found
                tick()
    return Manifest(
        root=str(root),
        files=strings(entries.files),
        file_id=np.array([image.file for image in images], np.int64)[good],
        member=strings([image.member for image in images])[good],
        offset=np.array([image.offset for image in images], np.int64)[good],
        label=np.array(entries.labels, np.int64)[good],
        classes=entries.classes,
        bad=tuple(bad),
        **columns(facts[good]),
    )


@contextlib.contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A function to be called at each step. From five seconds on it says how far it is: in place on a terminal."""
    started = told = time.monotonic()
    done = 0
    in_place = sys.stderr.isatty()

    def tick() -> None:
        nonlocal done, told
        done, now = done + 1, time.monotonic()
        if quiet or now - told < (0.2 if in_place and told > started else 5.0):
            return
        told, rate = now, done / (now - started)
        line = f"{what}: {done:,} of {total:,}, {rate:,.1f}/s, {(total - done) / rate:,.0f} s to go"
        if in_place:
            print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
        else:
            say(line)

    yield tick
    if in_place and told > started:
        print(file=sys.stderr)


def report_bad(manifest: Manifest, listing: Path | None) -> None:
    """Name the damaged files on stderr: up to ten, then their number and where the full list is."""
    for name, reason in manifest.bad[:_NAMED]:
        say(f"unreadable, left out: {name}: {reason}")
    if manifest.bad:
        where = f" ({listing})" if listing else ""
        total = len(manifest.bad) + len(manifest)
        say(f"{len(manifest.bad)} of {total} images of {manifest.root} unreadable{where}. Fix or remove them")
