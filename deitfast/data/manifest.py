"""A manifest: what a split holds, found out once by decoding every image, then cached.

A damaged image costs nothing in a scan and hours in the middle of a run, so every file is decoded in full before
the first step, and what does not decode is named and left out. The manifest also gives every image's size, from which
crops are drawn on the host. It is stored as one .npz without pickled objects, keyed by the folder and by the
names, sizes and times of its files, so a changed folder gets a new manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from deitfast.errors import DeitfastError

_VERSION = 1
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 50_000_000
_PER_IMAGE = ("file_id", "member", "offset", "length", "label", "width", "height", "checksum")
_NAMED = 10  # damaged files named on stderr; the rest is counted


@dataclass(frozen=True)
class Entries:
    """Images to scan. files: paths relative to the root; member: name inside a shard, or "" for a plain file."""

    files: Sequence[str]
    file_id: np.ndarray  # int64 (n,), into files
    member: Sequence[str]  # (n,)
    offset: np.ndarray  # int64 (n,), bytes
    length: np.ndarray  # int64 (n,), bytes; -1: the whole file
    label: np.ndarray  # int64 (n,)


@dataclass(frozen=True)
class Manifest:
    """The images of one split. All arrays have one entry an image, in a fixed order (sorted by name)."""

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
    classes: tuple[str, ...]
    bad: tuple[tuple[str, str], ...] = ()  # (name, reason) of every image left out
    _maps: dict[int, np.memmap] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def head(self, n: int) -> Manifest:
        """The first n images."""
        arrays = {name: getattr(self, name)[:n] for name in _PER_IMAGE}
        return replace(self, **arrays)

    def name(self, i: int) -> str:
        """Path of image i below the root; for an image in a shard, shard/member."""
        return _name(os.fsdecode(self.files[self.file_id[i]]), os.fsdecode(self.member[i]))

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of image i, a fresh uint8 array. Raises DeitfastError if the file is gone or changed."""
        file = int(self.file_id[i])
        path = os.path.join(self.root, os.fsdecode(self.files[file]))
        try:
            if self.member[i]:
                if file not in self._maps:
                    self._maps[file] = np.memmap(path, np.uint8, mode="r")
                data = np.array(self._maps[file][self.offset[i] : self.offset[i] + self.length[i]])
            else:
                data = np.fromfile(path, np.uint8)
        except (OSError, ValueError) as error:
            raise DeitfastError(f"cannot read {path}: {error}. The data changed during the run") from error
        if len(data) != self.length[i]:
            raise DeitfastError(
                f"{self.name(i)} in {self.root} has {len(data)} bytes, had {self.length[i]} when it was scanned. "
                "The data changed during the run"
            )
        return data

    def diagnose(self, i: int) -> str | None:
        """Why image i no longer decodes as it did when scanned; None if it does."""
        try:
            width, height, checksum = inspect_image(self.read(i).tobytes())
        except (DeitfastError, ValueError) as error:
            return str(error)
        if checksum != self.checksum[i]:
            return "its bytes changed since the scan"
        return None if (width, height) == (self.width[i], self.height[i]) else "its size changed since the scan"


def _name(file: str, member: str) -> str:
    return f"{file}/{member}" if member else file


def inspect_image(data: bytes) -> tuple[int, int, int]:
    """(width, height, checksum) of an encoded image that decodes in full; ValueError with the reason if not."""
    from PIL import Image

    if not data:
        raise ValueError("empty file")
    too_many = f"more than {MAX_PIXELS // 10**6} million pixels"
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels: {too_many}")
            image.load()
    except ValueError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit is higher, but met first
        raise ValueError(too_many) from None
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG, BMP or WebP image") from None
    except Exception as error:  # Pillow's decoders raise many kinds; each of them means the file is not usable
        raise ValueError(str(error) or type(error).__name__) from error
    return width, height, int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deitfast" / "manifests"


def digest(root: Path, paths: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Key of a manifest: changes with the root, any path, size or time below it, and the class list.

    paths: relative to root. Only the files are looked at, not read.
    """
    h = hashlib.blake2b(digest_size=16)
    h.update(repr((_VERSION, str(root), tuple(classes))).encode())
    for path in paths:
        stat = os.stat(root / path)
        h.update(os.fsencode(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    return h.hexdigest()


def scan(root: Path, entries: Entries, classes: Sequence[str], quiet: bool = False) -> Manifest:
    """Decode every entry, in threads; those that fail go to `bad`. Progress goes to stderr once it takes a while."""
    n = len(entries.label)

    def look(i: int) -> tuple[int, int, int, int] | str:
        path = root / entries.files[entries.file_id[i]]
        try:
            with open(path, "rb") as f:
                f.seek(int(entries.offset[i]))
                data = f.read(int(entries.length[i]))
            if len(data) < entries.length[i]:
                return f"truncated: {len(data)} of {entries.length[i]} bytes"
            return (len(data), *inspect_image(data))
        except (OSError, ValueError) as error:
            return str(error)

    table = np.zeros((n, 3), np.int64)
    checksum = np.zeros(n, np.uint64)
    good = np.zeros(n, bool)
    bad: list[tuple[str, str]] = []
    started = reported = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, n, 4096):  # a bounded number of tasks at a time
            for i, found in enumerate(pool.map(look, range(start, min(start + 4096, n))), start):
                if isinstance(found, str):
                    bad.append((_name(entries.files[entries.file_id[i]], entries.member[i]), found.replace("\n", " ")))
                else:
                    good[i] = True
                    table[i], checksum[i] = found[:3], found[3]
                now = time.monotonic()
                if not quiet and now - reported > 5:
                    reported = now
                    rate = (i + 1) / (now - started)
                    _say(f"checking {root}: {i + 1:,} of {n:,} images, {rate:.0f}/s, {(n - i) / rate:.0f} s to go")
    return Manifest(
        root=str(root),
        files=_strings(entries.files),
        file_id=np.asarray(entries.file_id, np.int64)[good],
        member=_strings(entries.member)[good],
        offset=np.asarray(entries.offset, np.int64)[good],
        length=table[good, 0],
        label=np.asarray(entries.label, np.int64)[good],
        width=table[good, 1],
        height=table[good, 2],
        checksum=checksum[good],
        classes=tuple(classes),
        bad=tuple(bad),
    )


def report_bad(manifest: Manifest, listing: Path | None) -> None:
    """Name the damaged files on stderr: up to ten, then their number and where the full list is."""
    for name, reason in manifest.bad[:_NAMED]:
        _say(f"unreadable, left out: {name}: {reason}")
    if manifest.bad:
        where = f" ({listing})" if listing else ""
        total = len(manifest.bad) + len(manifest)
        _say(f"{len(manifest.bad)} of {total} images of {manifest.root} unreadable{where}. Fix or remove them")


def bad_list(key: str) -> Path:
    """Where the names of a manifest's damaged files are written, one a line."""
    return cache_folder() / f"{key}.bad.txt"


def load(key: str) -> Manifest | None:
    """The cached manifest, or None where there is none or it cannot be read."""
    try:
        with np.load(cache_folder() / f"{key}.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        strings = {name: [os.fsdecode(x) for x in arrays.pop(name)] for name in ("classes", "bad_name", "bad_reason")}
        manifest = Manifest(
            root=os.fsdecode(arrays.pop("root")[0]),
            classes=tuple(strings["classes"]),
            bad=tuple(zip(strings["bad_name"], strings["bad_reason"], strict=True)),
            **arrays,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile):
        return None
    return manifest if all(len(getattr(manifest, name)) == len(manifest) for name in _PER_IMAGE) else None


def store(key: str, manifest: Manifest) -> None:
    """Write the manifest and the list of damaged files, each renamed into place. Failure is told, not fatal."""
    arrays = {f.name: getattr(manifest, f.name) for f in fields(manifest) if f.type == "np.ndarray"}
    arrays |= {
        "root": _strings([manifest.root]),
        "classes": _strings(manifest.classes),
        "bad_name": _strings([name for name, _ in manifest.bad]),
        "bad_reason": _strings([reason for _, reason in manifest.bad]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        if manifest.bad:
            lines = "".join(f"{name}\t{reason}\n" for name, reason in manifest.bad)
            _write(bad_list(key), os.fsencode(lines))
        _write(cache_folder() / f"{key}.npz", buffer.getvalue())
    except OSError as error:
        _say(f"cannot keep the manifest in {cache_folder()}: {error}. The next start scans again")


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _strings(values: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(v) for v in values], dtype=np.bytes_) if len(values) else np.zeros(0, "S1")


def _say(line: str) -> None:
    print(f"deitfast: {line}", file=sys.stderr, flush=True)
