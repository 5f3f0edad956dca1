"""A manifest: what a split holds, found out once by decoding every image.

A damaged image costs nothing in a scan and hours in the middle of a run, so every file is decoded in full before
the first step, and what does not decode is named and left out. The manifest also gives every image's size, from which
crops are drawn on the host, and the checksum of its bytes: a read that gives other bytes than the scan saw fails, so
nothing that changed afterwards, not even one flipped bit, reaches a decoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deitfast.errors import DeitfastError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 1 << 29  # an uncompressed image of so many pixels needs less
PER_IMAGE = (
    "file_id", "member", "offset", "length", "label", "width", "height", "checksum", "format", "convert",
)  # fmt: skip
_PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")  # those whose pixels DALI gives as PIL does
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Entries:
    """Images to scan. files: paths relative to the root; member: name inside a shard, or "" for a plain file."""

    files: Sequence[str]
    file_id: np.ndarray  # int64 (n,), into files
    member: Sequence[str]  # (n,)
    offset: np.ndarray  # int64 (n,), bytes
    length: np.ndarray  # int64 (n,), bytes; -1: the whole file
    label: np.ndarray  # int64 (n,)
    bad: Sequence[tuple[str, str]] = ()  # (name, reason) of what was seen to be damaged already


@dataclass(frozen=True)
class Manifest:
    """The images of one split. All arrays but `files` have one entry an image, in a fixed order (sorted by name)."""

    root: str  # absolute
    files: np.ndarray  # bytes: paths below root
    file_id: np.ndarray  # int64
    member: np.ndarray  # bytes: name inside the shard, empty for a plain file
    offset: np.ndarray  # int64, bytes
    length: np.ndarray  # int64, bytes
    label: np.ndarray  # int64
    width: np.ndarray  # int64, pixels
    height: np.ndarray  # int64, pixels
    checksum: np.ndarray  # uint64: blake2b-64 of the encoded bytes
    format: np.ndarray  # uint8, into FORMATS
    convert: np.ndarray  # bool: of a kind (16 bits) that DALI turns into other pixels than PIL, so PIL decodes it
    classes: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()  # (name, reason) of every image left out
    _shards: _OpenFiles = field(default_factory=lambda: _OpenFiles(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def head(self, n: int) -> Manifest:
        """The first n images."""
        return replace(self, **{name: getattr(self, name)[:n] for name in PER_IMAGE})

    def spread(self, n: int) -> Manifest:
        """n images at even distances, all where there are fewer: every class has its share."""
        index = np.arange(n) * len(self) // n if n < len(self) else np.arange(len(self))
        return replace(self, **{name: getattr(self, name)[index] for name in PER_IMAGE})

    def name(self, i: int) -> str:
        """Path of image i below the root; for an image in a shard, shard/member."""
        return name_of(os.fsdecode(self.files[self.file_id[i]]), os.fsdecode(self.member[i]))

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of image i as the scan saw them, a fresh uint8 array.

        Raises DeitfastError if the file is gone, cannot be read, or holds other bytes now.
        """
        path = os.path.join(self.root, os.fsdecode(self.files[self.file_id[i]]))
        length = int(self.length[i])
        try:
            if self.member[i]:
                data, extra = self._shards.read(path, int(self.offset[i]), length), 0
            else:
                data, extra = _read_file(path, length)
        except OSError as error:
            raise DeitfastError(
                f"cannot read {path}: {error.strerror or error}. The data changed in the run"
            ) from error
        reason = ""
        if len(data) != length or extra:
            reason = f"has {'more than ' if extra else ''}{len(data)} bytes, had {length} when it was scanned"
        elif checksum(data) != int(self.checksum[i]):
            reason = "holds other bytes than when it was scanned"
        if reason:
            raise DeitfastError(f"{self.name(i)} in {self.root} {reason}. The data changed in the run")
        return data

    def rgb(self, i: int) -> np.ndarray:
        """Image i as PIL decodes it: uint8 (height, width, 3). Raises DeitfastError as `read` does, or undecodable."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(self.read(i).data), formats=FORMATS) as image:
                return np.asarray(image.convert("RGB"))
        except DeitfastError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise DeitfastError(f"{self.name(i)} in {self.root} does not decode: {error}") from error

    def encoded(self, i: int, convert: bool = False) -> np.ndarray:
        """The bytes of image i for DALI: those of the file, or PIL's pixels as PPM where DALI's would differ."""
        if not (convert or self.convert[i]):
            return self.read(i)
        pixels = self.rgb(i)
        header = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
        return np.frombuffer(bytearray(header + pixels.tobytes()), np.uint8)


class _OpenFiles:
    """Shards kept open, the least recently used given up beyond a limit. Any number of threads may read.

    Read by position and not through a memory map: a map of a file that is truncated later kills the process at the
    next access, a read only comes out short.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # another process opens its own

    def read(self, path: str, offset: int, length: int) -> np.ndarray:
        """Up to `length` bytes at `offset`; a failure is tried once more on a newly opened file."""
        with contextlib.suppress(OSError):
            data = self._file(path).read(offset, length)
            if len(data) == length:
                return data
        with self._lock:
            self._open.pop(path, None)
        return self._file(path).read(offset, length)

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(path) or _OpenFile(path)
            self._open[path] = file
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # closed when its last reader lets go of it
            return file


class _OpenFile:
    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> np.ndarray:
        data, done = np.empty(length, np.uint8), 0
        while done < length:
            count = os.preadv(self._descriptor, [data.data[done:]], offset + done)
            if not count:
                break
            done += count
        return data[:done]

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _read_file(path: str, length: int) -> tuple[np.ndarray, int]:
    """Up to `length` bytes of a file, and how many more a glance shows: a file that grew is not read in full."""
    file = _OpenFile(path)
    return file.read(0, length), len(file.read(length, 1))


def name_of(file: str, member: str) -> str:
    return f"{file}/{member}" if member else file


def checksum(data: bytes | np.ndarray) -> int:
    """blake2b-64 of encoded bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Facts:
    """What a scan learns of one image. format: into FORMATS."""

    width: int
    height: int
    checksum: int
    format: int
    convert: bool


def inspect_image(data: bytes, whole: bool = True) -> Facts:
    """The facts of an encoded image; ValueError with the reason if it does not decode.

    whole: decode all of it, not only its header.
    """
    from PIL import Image

    if not data:
        raise ValueError("empty file")
    too_many = f"more than {MAX_PIXELS // 10**6} million pixels"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels: {too_many}")
            deep = image.format == "PNG" and data[24] == 16  # the header's bit depth, which PIL's mode may hide
            kind = image.format if image.format in FORMATS else "JPEG"  # MPO is JPEG with further images behind
            convert = image.mode not in _PLAIN_MODES or deep
            facts = Facts(width, height, checksum(data), FORMATS.index(kind), convert)
            if whole:
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


def scan(root: Path, entries: Entries, classes: Sequence[str], quiet: bool = False) -> Manifest:
    """Decode every entry, in threads; those that fail go to `bad`. Progress goes to stderr once it takes a while."""
    n = len(entries.label)

    def look(i: int) -> tuple[int, Facts] | str:
        path = root / entries.files[entries.file_id[i]]
        offset, length = int(entries.offset[i]), int(entries.length[i])
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = size if length < 0 else length
                if offset + length > size:  # before memory is taken for what is not there
                    return f"truncated: {max(size - offset, 0)} of {length} bytes"
                if length > MAX_BYTES:
                    return f"{length} bytes: more than {MAX_BYTES}"
                f.seek(offset)
                data = f.read(length)
            return len(data), inspect_image(data)
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    length, table, good = np.zeros(n, np.int64), np.zeros((n, 4), np.int64), np.zeros(n, bool)
    checksums = np.zeros(n, np.uint64)
    bad: list[tuple[str, str]] = list(entries.bad)
    started = reported = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, n, 4096):  # a bounded number of tasks at a time
            for i, found in enumerate(pool.map(look, range(start, min(start + 4096, n))), start):
                if isinstance(found, str):
                    name = name_of(entries.files[entries.file_id[i]], entries.member[i])
                    bad.append((name, " ".join(found.split())))
                else:
                    good[i], length[i], facts = True, found[0], found[1]
                    table[i] = facts.width, facts.height, facts.format, facts.convert
                    checksums[i] = facts.checksum
                now = time.monotonic()
                if not quiet and now - reported > 5:
                    reported = now
                    rate = (i + 1) / (now - started)
                    say(f"checking {root}: {i + 1:,} of {n:,} images, {rate:.0f}/s, {(n - i) / rate:.0f} s to go")
    return Manifest(
        root=str(root),
        files=strings(entries.files),
        file_id=np.asarray(entries.file_id, np.int64)[good],
        member=strings(entries.member)[good],
        offset=np.asarray(entries.offset, np.int64)[good],
        length=length[good],
        label=np.asarray(entries.label, np.int64)[good],
        width=table[good, 0],
        height=table[good, 1],
        checksum=checksums[good],
        format=table[good, 2].astype(np.uint8),
        convert=table[good, 3].astype(bool),
        classes=tuple(classes),
        bad=tuple(bad),
    )


def strings(values: Sequence[str]) -> np.ndarray:
    """File names as a numpy array of bytes."""
    return np.array([os.fsencode(v) for v in values], dtype=np.bytes_) if len(values) else np.zeros(0, "S1")


def say(line: str) -> None:
    """One line to stderr."""
    print(f"deitfast: {line}", file=sys.stderr, flush=True)
