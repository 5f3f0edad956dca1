"""Where images come from: class folders or tar shards, found under one folder, turned into manifests.

    folder/train/<class>/*.jpg         folder/val/<class>/*.jpg        (`validation` and `test` are accepted for val)
    folder/train/*.tar, train-*.tar, train.tar                         (likewise for val)

Shards are plain tar files in WebDataset's layout, `key.jpg` beside `key.cls` (an integer) or `key.json` (with "label"),
or with class folders inside, `<class>/name.jpg`. They are read in place by offset; nothing is unpacked. Class names of
integer labels are the lines of `classes.txt` beside the shards where there is one.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deitfast.data.manifest import Entries, Manifest, bad_list, digest, load, report_bad, scan, store
from deitfast.errors import DeitfastError, did_you_mean

# Images of the second set cannot be used, but must be named rather than passed over.
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp"}
_FOREIGN_SUFFIXES = {".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".heic", ".heif", ".jp2"}
_SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}
_LAYOUTS = "Give a folder with train/<class>/* and val/<class>/*, or tar shards"
PACKAGED = {"digits": Path(__file__).parent / "digits"}


@dataclass(frozen=True)
class Dataset:
    """The splits that were found and their common class names, in label order."""

    train: Manifest | None
    val: Manifest | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """One split as found on disk: class folders (`shards` false) or tar files. paths are relative to root."""

    root: Path
    paths: tuple[str, ...]
    shards: bool
    folders: tuple[str, ...] = ()  # class names, in sorted order


def imagenet_classes() -> tuple[str, ...]:
    """ImageNet-1k's 1,000 synsets in label order, which is sorted order (source: timm, `imagenet_synsets.txt`)."""
    return tuple((Path(__file__).parent / "imagenet_synsets.txt").read_text().split())


def open_dataset(
    data: str, split: str | None = None, classes: str | Sequence[str] | None = None, quiet: bool = False
) -> Dataset:
    """Find, check and index the images under `data`, a folder or the name of a packaged set (`digits`).

    split: None for train and, where there is one, val; "train" or "val" for one of them. With "val" a folder that
    directly holds class folders will do. classes: None for the data's own; "imagenet" to label synset folders by their
    rank among ImageNet's 1,000; or the names in label order, such as a checkpoint's. quiet: no progress and no list of
    damaged files (for the further processes of a machine, which find the first one's manifests in the cache).

    Raises DeitfastError, in one line, for a folder that is missing or empty or of another layout, and for classes that
    disagree.
    """
    if split not in (None, "train", "val"):
        raise DeitfastError(f"split {split!r} unknown. Use train or val")
    root = _root(data)
    if classes == "imagenet":
        known: tuple[str, ...] | None = imagenet_classes()
    elif isinstance(classes, str):
        raise DeitfastError(f"classes {classes!r} unknown. Use imagenet, or leave it out for the data's own")
    else:
        known = tuple(classes) if classes is not None else None

    train = _find(root, "train")
    val = None if split == "train" else _find(root, "val") or (_class_folders(root) if split == "val" else None)
    if (train is None and split != "val") or (val is None and split == "val"):
        raise _not_found(root, split or "train")

    # The training split's names define the labels, also where only val is asked for.
    train_manifest = _open(train, known, quiet) if train is not None and split != "val" else None
    if known is None and train_manifest is not None:
        known = train_manifest.classes
    elif known is None and train is not None:
        known = _classes_of(train)
    val_manifest = _open(val, known, quiet) if val is not None else None
    found = train_manifest or val_manifest
    assert found is not None
    return Dataset(train_manifest, val_manifest, found.classes)


def _root(data: str) -> Path:
    if data in PACKAGED:
        return PACKAGED[data]
    root = Path(data).expanduser()
    if root.is_dir():
        return root.resolve()
    if root.exists():
        raise DeitfastError(f"data {data} is a file. Give the folder that holds it, with train.tar and val.tar")
    hint = ""
    if root.parent.is_dir():
        names = [p.name for p in root.parent.iterdir() if p.is_dir()]
        hint = did_you_mean(root.name, names + (list(PACKAGED) if os.sep not in data else []))
    raise DeitfastError(f"data folder {data} not found.{hint or ' ' + _LAYOUTS}")


def _find(root: Path, split: str) -> _Source | None:
    """The split under root, or None where nothing bears its name."""
    for name in _SPLITS[split]:
        folder = root / name
        shards = sorted(folder.glob("*.tar")) or sorted(root.glob(f"{name}-*.tar")) or sorted(root.glob(f"{name}.tar"))
        if shards:
            return _Source(root, tuple(str(p.relative_to(root)) for p in shards), shards=True)
        if folder.is_dir():
            source = _class_folders(folder)
            if source is None:
                raise _not_found(folder, split)
            return source
    return None


def _class_folders(root: Path) -> _Source | None:
    """The images of the class folders right below root, or None where there are no folders."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        return None
    paths: list[str] = []
    empty = []
    for name in folders:
        inside = sorted(
            os.path.relpath(os.path.join(base, f), root)
            for base, _, files in os.walk(root / name, followlinks=True)
            for f in files
            if _is_image(f)
        )
        paths += inside
        if not inside:
            empty.append(name)
    if not paths:
        raise DeitfastError(f"no images in the {len(folders)} class folders of {root}. {_LAYOUTS}")
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DeitfastError(f"class folder {root / empty[0]}{more} has no images. Fill it or remove it")
    return _Source(root, tuple(paths), shards=False, folders=tuple(folders))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES | _FOREIGN_SUFFIXES


def _not_found(root: Path, split: str) -> DeitfastError:
    """What is there instead, and what would do."""
    names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    there = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
    hint = ""
    packed = [n for n in names if n.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip"))]
    if packed:
        hint = f" Unpack {packed[0]}, or repack it as plain tar."
    if root.name in sum(_SPLITS.values(), ()):
        return DeitfastError(f"no class folders in {root}; found {there}.{hint} {_LAYOUTS}")
    return DeitfastError(f"no {split} split in {root}; found {there}.{hint} {_LAYOUTS}")


def _open(source: _Source, known: tuple[str, ...] | None, quiet: bool) -> Manifest:
    """The source's manifest with labels by `known` (by its own names if None): from the cache, or by a scan."""
    key = _key(source, known)
    manifest = load(key)
    if manifest is None or manifest.root != str(source.root):
        entries, names = _shard_entries(source, known) if source.shards else _folder_entries(source, known)
        manifest = scan(source.root, entries, names, quiet)
        store(key, manifest)
    if not quiet:
        report_bad(manifest, bad_list(key))
    if len(manifest) == 0:
        raise DeitfastError(f"none of the {len(manifest.bad)} images of {source.root} is readable ({bad_list(key)})")
    return manifest


def _key(source: _Source, known: tuple[str, ...] | None) -> str:
    beside = (p for p in _names_files(source) if (source.root / p).is_file())
    return digest(source.root, (*source.paths, *beside), known or ())


def _names_files(source: _Source) -> list[str]:
    """Where a list of class names may lie, beside the shards."""
    if not source.shards:
        return []
    return sorted({os.path.join(os.path.dirname(source.paths[0]), "classes.txt"), "classes.txt"}, reverse=True)


def _classes_of(source: _Source) -> tuple[str, ...]:
    """The source's own class names, without decoding an image."""
    if not source.shards:
        return source.folders
    cached = load(_key(source, None))
    return cached.classes if cached is not None else _shard_entries(source, None)[1]


def _labels(found: Sequence[str], known: tuple[str, ...], where: str) -> dict[str, int]:
    """Label of each class name found; an error names a class that is not known."""
    index = {name: i for i, name in enumerate(known)}
    strange = [name for name in found if name not in index]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise DeitfastError(
            f"class {strange[0]!r}{more} of {where} is none of the {len(known)} known ({known[0]} to {known[-1]})."
            f"{did_you_mean(strange[0], known)} Train and val must have the same classes"
        )
    return {name: index[name] for name in found}


def _folder_entries(source: _Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    names = known or source.folders
    label = _labels(source.folders, names, str(source.root))
    n = len(source.paths)
    entries = Entries(
        files=source.paths,
        file_id=np.arange(n),
        member=[""] * n,
        offset=np.zeros(n, np.int64),
        length=np.full(n, -1),
        label=np.array([label[p.split(os.sep, 1)[0]] for p in source.paths], np.int64),
    )
    return entries, names


@dataclass(frozen=True)
class _Member:
    shard: int
    name: str
    offset: int
    length: int
    label: int | None  # from .cls or .json
    folder: str  # class folder inside the shard, else ""


def _shard_entries(source: _Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    """Index the shards by their headers. Labels: integers where the images have them, else class folders."""
    members = [m for i, path in enumerate(source.paths) for m in _read_headers(source.root / path, i)]
    where = f"{source.root / source.paths[0]}" + (f" (of {len(source.paths)})" if len(source.paths) > 1 else "")
    if not members:
        raise DeitfastError(f"no images in {where}. {_LAYOUTS}")
    bare = next((m for m in members if m.label is None and not m.folder), None)
    if bare is not None:
        raise DeitfastError(
            f"{bare.name} in {source.root / source.paths[bare.shard]} has no label. "
            "Put key.cls or key.json beside each image, or use class folders inside the shard"
        )
    listed = next((source.root / p for p in _names_files(source) if (source.root / p).is_file()), None)
    if known is None and listed is not None:
        known = tuple(line.strip() for line in listed.read_text().splitlines() if line.strip())

    if all(m.label is not None for m in members):
        numbers = [m.label for m in members if m.label is not None]
        names = known or tuple(str(i) for i in range(max(numbers) + 1))
        outside = next((m for m in members if m.label is not None and not 0 <= m.label < len(names)), None)
        if outside is not None:
            raise DeitfastError(
                f"label {outside.label} of {outside.name} in {source.root / source.paths[outside.shard]} is outside "
                f"the {len(names)} known classes. Train and val must have the same classes"
            )
    elif all(m.label is None for m in members):
        found = sorted({m.folder for m in members})
        names = known or tuple(found)
        by_name = _labels(found, names, where)
        numbers = [by_name[m.folder] for m in members]
    else:
        some = next(m for m in members if m.label is None)
        raise DeitfastError(f"{some.name} in {where} has no .cls or .json, others have. Label all of them or none")
    entries = Entries(
        files=source.paths,
        file_id=np.array([m.shard for m in members], np.int64),
        member=[m.name for m in members],
        offset=np.array([m.offset for m in members], np.int64),
        length=np.array([m.length for m in members], np.int64),
        label=np.array(numbers, np.int64),
    )
    return entries, names


def _read_headers(path: Path, shard: int) -> list[_Member]:
    """The images of one tar file, sorted by name, with their labels."""
    images: dict[str, _Member] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                base = os.path.basename(info.name)
                if not info.isreg() or base.startswith("."):
                    continue
                # WebDataset: the key ends at the first dot of the file name.
                key = os.path.join(os.path.dirname(info.name), base.split(".", 1)[0])
                if _is_image(base):
                    folder = os.path.basename(os.path.dirname(info.name))
                    images[info.name] = _Member(shard, info.name, info.offset_data, info.size, None, folder)
                elif base.endswith((".cls", ".json")):
                    file = tar.extractfile(info)
                    assert file is not None
                    label = _parse_label(file.read(), base.endswith(".json"), f"{info.name} in {path}")
                    if label is not None:
                        labels[key] = label
    except tarfile.TarError as error:
        raise DeitfastError(f"{path} is not a whole, uncompressed tar file ({error}). Repack it") from error
    result = []
    for name in sorted(images):
        key = os.path.join(os.path.dirname(name), os.path.basename(name).split(".", 1)[0])
        result.append(replace(images[name], label=labels.get(key)))
    return result


def _parse_label(text: bytes, is_json: bool, where: str) -> int | None:
    """The integer of a .cls, or "label" of a .json; None for a .json without one."""
    try:
        if not is_json:
            return int(text)
        value = json.loads(text)
        return int(value["label"]) if isinstance(value, dict) and "label" in value else None
    except (ValueError, TypeError) as error:
        raise DeitfastError(f"{where} holds no integer label ({text[:40]!r})") from error
