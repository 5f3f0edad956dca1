"""A manifest: what a split holds, and where it is kept between runs.

It gives every image's size, from which crops are drawn on the host, and the checksum of its bytes: a read that gives
other bytes than the scan saw fails, so nothing that changed afterwards, not even one flipped bit, reaches a decoder.

On disk a manifest is one .npz without pickled objects. In the cache it is keyed by the folder and by the names, sizes
and times of its files, so a changed folder gets a new one. Beside prepared shards it goes by the shards' names and
sizes only, because copying changes the times; every read compares checksums anyway. A file that is damaged or that
claims what it does not hold counts as absent, and the images are scanned again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deitfast.data.parquet import read_row
from deitfast.errors import DeitfastError, say
from deitfast.files import cache_folder, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
MAX_PIXELS = 178_000_000  # Pillow refuses more than 178,956,970
MAX_BYTES = 1 << 30  # an uncompressed image of so many pixels needs less
PER_IMAGE = (
    "file_id", "member", "offset", "length", "label", "width", "height", "checksum", "format", "convert",
)  # fmt: skip
_OPEN_SHARDS = 128


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
    staged: str = ""  # folder of this machine where copies of the files lie, or come to lie; empty: none
    _shards: _OpenFiles = field(default_factory=lambda: _OpenFiles(), repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def take(self, chosen: slice | np.ndarray) -> Manifest:
        """Some of the images, by a slice or by their numbers."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in PER_IMAGE})

    def head(self, n: int) -> Manifest:
        """The first n images."""
        return self.take(slice(n))

    def spread(self, n: int) -> Manifest:
        """n images at even distances, all where there are fewer: every class has its share."""
        return self.take(np.arange(n) * len(self) // n) if n < len(self) else self

    def name(self, i: int) -> str:
        """Path of image i below the root; for an image in a shard, shard/member."""
        return name_of(os.fsdecode(self.files[self.file_id[i]]), os.fsdecode(self.member[i]))

    def read(self, i: int) -> np.ndarray:
        """The encoded bytes of image i as the scan saw them, a fresh uint8 array.

        A staged copy that is not there yet, or holds other bytes, is passed over. Raises DeitfastError if the file is
        gone, cannot be read, or holds other bytes now.
        """
        if self.staged:
            with contextlib.suppress(DeitfastError):
                return self._read(i, self.staged)
        return self._read(i, self.root)

    def _read(self, i: int, root: str) -> np.ndarray:
        path = os.path.join(root, os.fsdecode(self.files[self.file_id[i]]))
        length = int(self.length[i])
        try:
            if path.endswith(".parquet"):  # the offset is the row there
                data = read_row(path, int(self.offset[i]))
            elif self.member[i]:
                data = self._shards.read(path, int(self.offset[i]), length)
            else:
                data = _OpenFile(path).read(0, length + 1)  # of a file that grew no more than shows it
        except OSError as error:
            raise DeitfastError(
                f"cannot read {path}: {error.strerror or error}. The data changed in the run"
            ) from error
        reason = ""
        if len(data) != length:
            more = "more than " if len(data) > length else ""
            reason = f"has {more}{min(len(data), length)} bytes, had {length} when it was scanned"
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
                return np.asarray(to_rgb(image))
        except DeitfastError:
            raise
        except Exception as error:  # Pillow's decoders raise many kinds
            raise DeitfastError(f"{self.name(i)} in {self.root} does not decode: {error}") from error

    def encoded(self, i: int, convert: bool = False) -> np.ndarray:
        """The bytes of image i for DALI: those of the file, or PIL's pixels as PPM where DALI's would differ."""
        if not (convert or self.convert[i]):
            return self.read(i)
        return as_ppm(self.rgb(i))


def most_pixels() -> int:
    """The most pixels that an image may have: Pillow's own bound or, where it is set, DEITFAST_MAX_PIXELS.

    The bound is there against files of a few bytes that fill the memory; Pillow's is raised with ours. Raises
    DeitfastError for a value that is no number of pixels.
    """
    named = os.environ.get("DEITFAST_MAX_PIXELS")
    if not named:
        return MAX_PIXELS
    from PIL import Image

    try:
        most = int(float(named))
    except (ValueError, OverflowError):
        most = 0
    if most < 1:
        raise DeitfastError(f"DEITFAST_MAX_PIXELS is {named!r}, must be a number of pixels, such as 4e8")
    Image.MAX_IMAGE_PIXELS = most  # it warns there, and refuses twice as many
    return most


def to_rgb(image: PILImage) -> PILImage:
    """A PIL image in RGB, as PIL's own conversion gives it, without its warning about palettes with transparency."""
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    return image.convert("RGB")


def as_ppm(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) as the bytes of an uncompressed image file, which DALI reads as it is."""
    header = b"P6 %d %d 255\n" % (pixels.shape[1], pixels.shape[0])
    return np.frombuffer(bytearray(header + pixels.tobytes()), np.uint8)


class _OpenFiles:
    """Shards kept open, the least recently used given up beyond a limit. Any number of threads may read.

    Read by position and not through a memory map: a map of a file that is truncated later kills the process at the
    next access, a read only comes out short.
    """

    def __init__(self) -> None:
        self._open = lru_cache(_OPEN_SHARDS)(_OpenFile)  # closed when its last reader lets go of it

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # another process opens its own

    def read(self, path: str, offset: int, length: int) -> np.ndarray:
        """Up to `length` bytes at `offset`; a failure is tried once more on a newly opened file."""
        with contextlib.suppress(OSError):
            data = self._open(path).read(offset, length)
            if len(data) == length:
                return data
        self._open.cache_clear()
        return self._open(path).read(offset, length)


class _OpenFile:
    def __init__(self, path: str) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> np.ndarray:
        length = min(length, max(os.fstat(self._descriptor).st_size - offset, 0))  # a manifest may claim any number
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


def name_of(file: str, member: str) -> str:
    return f"{file}/{member}" if member else file


def checksum(data: bytes | np.ndarray) -> int:
    """blake2b-64 of encoded bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")  # type: ignore[arg-type]


def strings(values: Sequence[str]) -> np.ndarray:
    """File names as a numpy array of bytes."""
    return np.array([os.fsencode(v) for v in values], dtype=np.bytes_) if len(values) else np.zeros(0, "S1")


# On disk -------------------------------------------------------------------------------------------------------------

_VERSION = 2
_KINDS = {"files": "S", "member": "S", "checksum": "u", "format": "u", "convert": "b"}  # all others: int64


def digest(root: Path, paths: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Key of a cached manifest: changes with the root, any path, size or time below it, and the class list.

    paths: relative to root. Only the files are looked at, not read.
    """
    h = hashlib.blake2b(digest_size=16)
    h.update(repr((_VERSION, str(root), tuple(classes))).encode())
    if most_pixels() != MAX_PIXELS:  # what is too large depends on it
        h.update(repr(most_pixels()).encode())
    for path in paths:
        try:
            stat = os.stat(root / path)
            h.update(os.fsencode(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
        except OSError:  # such as a link to nothing; the scan will name it
            h.update(os.fsencode(f"{path}\0missing\n"))
    return h.hexdigest()


def load(key: str) -> Manifest | None:
    """The cached manifest, or None where there is none or it cannot be used."""
    return read_manifest(cache_folder("manifests") / f"{key}.npz")


def store(key: str, manifest: Manifest) -> None:
    """Put the manifest and the list of damaged files into the cache. Failure is told, not fatal."""
    folder = cache_folder("manifests")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if manifest.bad:
            lines = "".join(f"{name}\t{reason}\n" for name, reason in manifest.bad)
            write_atomically(bad_list(key), lambda path: path.write_bytes(os.fsencode(lines)))
        write_manifest(folder / f"{key}.npz", manifest)
    except OSError as error:
        say(f"cannot keep the manifest in {folder}: {error}. The next start scans again")


def bad_list(key: str) -> Path:
    """Where the names of a manifest's damaged files are written, one a line."""
    return cache_folder("manifests") / f"{key}.bad.txt"


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest to `path`, renamed into place. Raises OSError."""
    arrays = {f.name: getattr(manifest, f.name) for f in fields(manifest) if f.type == "np.ndarray"}
    arrays |= {
        "version": np.array([_VERSION]),
        "root": strings([manifest.root]),
        "classes": strings(manifest.classes),
        "bad_name": strings([name for name, _ in manifest.bad]),
        "bad_reason": strings([reason for _, reason in manifest.bad]),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def read_manifest(path: Path, root: Path | None = None) -> Manifest | None:
    """The manifest in a file, or None where there is none or it is not usable. root: the folder it lies in now."""
    try:
        arrays = _arrays(path.read_bytes())
        if arrays.pop("version").tolist() != [_VERSION]:
            return None
        texts = {name: [os.fsdecode(x) for x in arrays.pop(name)] for name in ("classes", "bad_name", "bad_reason")}
        manifest = Manifest(
            root=str(root) if root else os.fsdecode(arrays["root"][0]),
            classes=tuple(texts["classes"]),
            bad=tuple(zip(texts["bad_name"], texts["bad_reason"], strict=True)),
            **{name: arrays[name] for name in ("files", *PER_IMAGE)},  # type: ignore[arg-type]
        )
        return manifest if _sound(manifest) else None
    except Exception:  # zip and npy readers raise many kinds on damage; each means that the file cannot be used
        return None


def prepared(path: Path, root: Path, files: Sequence[str]) -> Manifest | None:
    """The manifest that lies beside prepared shards, if it speaks of just these files in full; else None."""
    manifest = read_manifest(path, root)
    if manifest is None or sorted(os.fsdecode(f) for f in manifest.files) != sorted(files):
        return None
    last = np.zeros(len(manifest.files), np.int64)
    np.maximum.at(last, manifest.file_id, manifest.offset + manifest.length)
    sizes = [os.stat(root / os.fsdecode(f)).st_size for f in manifest.files]
    return manifest if (last <= np.array(sizes)).all() else None


def relabelled(manifest: Manifest, classes: Sequence[str], label_of: dict[str, int]) -> Manifest:
    """The manifest with its classes renumbered by name."""
    new = np.array([label_of[name] for name in manifest.classes], np.int64)
    return replace(manifest, label=new[manifest.label], classes=tuple(classes))


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, none of which may claim more than the file holds."""
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) for info in members.infolist()):
            raise ValueError("compressed")
        if members.testzip():
            raise ValueError("a member's CRC is wrong")
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    if not all(array.itemsize for array in arrays.values()):
        raise ValueError("values of no bytes, of which a file may claim any number")
    return arrays


def _sound(m: Manifest) -> bool:
    """Whether every entry is of its kind and within its range."""
    arrays: dict[str, Any] = {name: getattr(m, name) for name in ("files", *PER_IMAGE)}
    right_kind = all(
        array.ndim == 1 and array.dtype.kind == _KINDS.get(name, "i") and (name in _KINDS or array.dtype.itemsize == 8)
        for name, array in arrays.items()
    )
    if not right_kind or any(len(arrays[name]) != len(m) for name in PER_IMAGE):
        return False
    if not len(m):
        return True
    lows = min(int(getattr(m, name).min()) for name in ("file_id", "offset", "length", "label"))
    sides = min(int(m.width.min()), int(m.height.min()))
    return (
        lows >= 0
        and sides >= 1
        and int(m.file_id.max()) < len(m.files)
        and int(m.label.max()) < len(m.classes)
        and int(m.format.max()) < len(FORMATS)
        and bool((m.width <= most_pixels() // m.height).all())
    )
