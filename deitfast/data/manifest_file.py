"""Manifests on disk: kept in the cache between runs, and beside prepared shards.

A manifest is one .npz without pickled objects. In the cache it is keyed by the folder and by the names, sizes and
times of its files, so a changed folder gets a new one. Beside prepared shards it goes by the shards' names and sizes
only, because copying changes the times; every read compares checksums anyway. A file that is damaged or that claims
what it does not hold counts as absent, and the images are scanned again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from deitfast.data.manifest import FORMATS, MAX_PIXELS, PER_IMAGE, Manifest, say, strings
from deitfast.paths import cache_folder

_VERSION = 2
_NAMED = 10  # damaged files named on stderr; the rest is counted
_KINDS = {"files": "S", "member": "S", "checksum": "u", "format": "u", "convert": "b"}  # all others: int64


def digest(root: Path, paths: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Key of a cached manifest: changes with the root, any path, size or time below it, and the class list.

    paths: relative to root. Only the files are looked at, not read.
    """
    h = hashlib.blake2b(digest_size=16)
    h.update(repr((_VERSION, str(root), tuple(classes))).encode())
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
            write_atomically(bad_list(key), os.fsencode(lines))
        write_manifest(folder / f"{key}.npz", manifest)
    except OSError as error:
        say(f"cannot keep the manifest in {folder}: {error}. The next start scans again")


def bad_list(key: str) -> Path:
    """Where the names of a manifest's damaged files are written, one a line."""
    return cache_folder("manifests") / f"{key}.bad.txt"


def report_bad(manifest: Manifest, listing: Path | None) -> None:
    """Name the damaged files on stderr: up to ten, then their number and where the full list is."""
    for name, reason in manifest.bad[:_NAMED]:
        say(f"unreadable, left out: {name}: {reason}")
    if manifest.bad:
        where = f" ({listing})" if listing else ""
        total = len(manifest.bad) + len(manifest)
        say(f"{len(manifest.bad)} of {total} images of {manifest.root} unreadable{where}. Fix or remove them")


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
    write_atomically(path, buffer.getvalue())


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
    """The arrays of an .npz file, refusing any that claims more than the file holds."""
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise ValueError("compressed")
            member = io.BytesIO(archive.read(info))  # checks the zip's CRC
            if np.lib.format.read_magic(member) != (1, 0):
                raise ValueError("npy version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            start = member.tell()
            if dtype.hasobject or len(shape) != 1 or shape[0] * dtype.itemsize != info.file_size - start:
                raise ValueError("shape")
            arrays[info.filename.removesuffix(".npy")] = np.frombuffer(member.getbuffer(), dtype, offset=start).copy()
    return arrays


def _sound(m: Manifest) -> bool:
    """Whether every entry is of its kind and within its range."""
    arrays: dict[str, Any] = {name: getattr(m, name) for name in ("files", *PER_IMAGE)}
    right_kind = all(
        array.dtype.kind == _KINDS.get(name, "i") and (name in _KINDS or array.dtype.itemsize == 8)
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
        and bool((m.width <= MAX_PIXELS // m.height).all())
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in full or not at all: to a temporary one beside it, renamed into place."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
        os.chmod(temporary, 0o644)  # mkstemp's is for the owner alone
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
