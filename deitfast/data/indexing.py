"""What a split holds, found from names and headers alone: every image's place and label, not yet decoded.

Class folders: `<class>/name.jpg`. Shards: plain tar files in WebDataset's layout, `key.jpg` beside `key.cls` (an
integer) or `key.json` (with "label"), or with class folders inside, `<class>/name.jpg`. TFRecords: ImageNet's layout
(`tfrecord`).

Class names of integer labels are the lines of `classes.txt` beside the files where there is one. A record's label
counts from 1 where ImageNet's do: the synset in the record settles it, or a label 0, or the highest class; what leaves
it open is an error, because labels that are off by one would go unnoticed.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from deitfast.data.files import begins_as_image, is_hidden, named_as_image
from deitfast.data.scan import Entries
from deitfast.data.tfrecord import Record, read_records
from deitfast.errors import DeitfastError, did_you_mean

LARGEST_CLASS = 1_000_000  # a list of class names is as long as the largest number
_LARGEST_LABEL = 1 << 16  # bytes of a .cls or .json
_TAR_ERRORS = (
    tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError, MemoryError, struct.error,
)  # fmt: skip
"""What tarfile raises for damaged or crafted headers."""


@dataclass(frozen=True)
class Source:
    """One split as found on disk. paths: image files, shards or record files, relative to root.

    kind: folders, tar or tfrecord. folders: class names, in sorted order, of class folders.
    """

    root: Path
    paths: tuple[str, ...]
    kind: str
    split: str
    folders: tuple[str, ...] = ()


def entries_of(source: Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    """The images of a source, labelled by the class names `known` (by its own if None), and the class names."""
    index = {"folders": _folder_entries, "tar": _shard_entries, "tfrecord": _record_entries}[source.kind]
    return index(source, known)


def names_files(source: Source) -> list[str]:
    """Where a list of class names may lie, beside the shards."""
    if source.kind == "folders":
        return []
    return sorted({os.path.join(os.path.dirname(source.paths[0]), "classes.txt"), "classes.txt"}, reverse=True)


def label_numbers(found: Sequence[str], known: tuple[str, ...], where: str) -> dict[str, int]:
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


def _folder_entries(source: Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    names = known or source.folders
    label = label_numbers(source.folders, names, str(source.root))
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


def _listed_names(source: Source) -> tuple[str, ...] | None:
    """The lines of the list of class names beside the files, if there is one."""
    listed = next((source.root / p for p in names_files(source) if (source.root / p).is_file()), None)
    if listed is None:
        return None
    return tuple(line.strip() for line in listed.read_text().splitlines() if line.strip())


@dataclass(frozen=True)
class _Member:
    shard: int
    name: str
    offset: int
    length: int
    label: int | None  # from .cls or .json
    folder: str  # class folder inside the shard, else ""


def _shard_entries(source: Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    """Index the shards by their headers. Labels: integers where the images have them, else class folders."""
    members = [m for i, path in enumerate(source.paths) for m in _read_headers(source.root / path, i)]
    where = f"{source.root / source.paths[0]}" + (f" (of {len(source.paths)})" if len(source.paths) > 1 else "")
    if not members:
        raise DeitfastError(f"no images in {where}. Give shards of key.jpg beside key.cls, or of <class>/name.jpg")
    bare = next((m for m in members if m.label is None and not m.folder), None)
    if bare is not None:
        raise DeitfastError(
            f"{bare.name} in {source.root / source.paths[bare.shard]} has no label. "
            "Put key.cls or key.json beside each image, or use class folders inside the shard"
        )
    known = known or _listed_names(source)
    if all(m.label is not None for m in members):
        numbers = [m.label for m in members if m.label is not None]
        absurd = next((m for m in members if not 0 <= (m.label or 0) <= LARGEST_CLASS), None)
        if absurd is not None:
            path = source.root / source.paths[absurd.shard]
            raise DeitfastError(f"label {absurd.label} of {absurd.name} in {path} is no class number")
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
        by_name = label_numbers(found, names, where)
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
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.size < 0 or info.offset_data < end:  # a crafted header may lead backwards, for ever
                    raise tarfile.ReadError(f"header of {info.name!r} points backwards")
                end = info.offset_data
                base = os.path.basename(info.name)
                if not info.isreg() or any(map(is_hidden, info.name.split("/"))):
                    continue
                is_label = base.endswith((".cls", ".json"))
                if named_as_image(base) or (not is_label and _holds_image(tar, info)):
                    folder = os.path.basename(os.path.dirname(info.name))
                    images[info.name] = _Member(shard, info.name, info.offset_data, info.size, None, folder)
                elif is_label:
                    file = tar.extractfile(info)
                    assert file is not None
                    label = _parse_label(file.read(_LARGEST_LABEL), base.endswith(".json"), f"{info.name} in {path}")
                    if label is not None:
                        labels[os.path.splitext(info.name)[0]] = label
    except DeitfastError:
        raise
    except OSError as error:
        raise DeitfastError(f"cannot read {path}: {error.strerror or error}") from error
    except _TAR_ERRORS as error:
        raise DeitfastError(f"{path} is not a whole, uncompressed tar file ({error}). Repack it") from error
    return [replace(images[name], label=_label_of(name, labels)) for name in sorted(images)]


def _holds_image(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bool:
    """Whether a member whose name does not tell begins as an image does."""
    file = tar.extractfile(info)
    return file is not None and begins_as_image(file.read(16))


def _label_of(image: str, labels: dict[str, int]) -> int | None:
    """The label file's value: of the same name up to the last dot, else of WebDataset's key, up to the first."""
    folder, base = os.path.split(image)
    stem = base
    while "." in stem:  # key.v2.input.jpg may have key.v2.input.cls, key.v2.cls or key.cls
        stem = stem.rpartition(".")[0]
        if (found := labels.get(os.path.join(folder, stem))) is not None:
            return found
    return labels.get(os.path.join(folder, base))


def _parse_label(text: bytes, is_json: bool, where: str) -> int | None:
    """The integer of a .cls, or "label" of a .json; None for a .json without one."""
    try:
        if not is_json:
            return int(text)
        value = json.loads(text)
        return int(value["label"]) if isinstance(value, dict) and "label" in value else None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DeitfastError(f"{where} holds no integer label ({text[:40]!r})") from error


def _record_entries(source: Source, known: tuple[str, ...] | None) -> tuple[Entries, tuple[str, ...]]:
    """Index TFRecord files. Labels: synsets where the records name them, else their integers."""
    found: list[tuple[int, Record]] = []
    bad: list[tuple[str, str]] = []
    for i, path in enumerate(source.paths):
        records, damaged = read_records(source.root / path)
        found += [(i, record) for record in records]
        bad += [(f"{path}/{name}", reason) for name, reason in damaged]
    where = f"{source.root / source.paths[0]}" + (f" (of {len(source.paths)})" if len(source.paths) > 1 else "")
    if not found:
        raise DeitfastError(f"no images in {where}. Records need the features image/encoded and image/class/label")
    known = known or _listed_names(source)
    records = [record for _, record in found]
    synsets = {record.synset for record in records}
    if "" not in synsets and (known is None or synsets <= set(known)):
        names = known or tuple(sorted(synsets))
        numbers = label_numbers(sorted(synsets), names, where)
        labels = [numbers[record.synset] for record in records]
    else:
        labels, names = _integer_labels(records, known, where)
    entries = Entries(
        files=source.paths,
        file_id=np.array([i for i, _ in found], np.int64),
        member=[_member_name(record) for record in records],
        offset=np.array([record.offset for record in records], np.int64),
        length=np.array([record.length for record in records], np.int64),
        label=np.array(labels, np.int64),
        bad=bad,
    )
    return entries, names


def _integer_labels(
    records: Sequence[Record], known: tuple[str, ...] | None, where: str
) -> tuple[list[int], tuple[str, ...]]:
    """Labels from 0 of records with integer labels, and the class names."""
    missing = next((record for record in records if record.label is None), None)
    if missing is not None:
        raise DeitfastError(f"record {missing.number} in {where} has no image/class/label")
    raw = [record.label for record in records if record.label is not None]
    low, high = min(raw), max(raw)
    if low < 0 or high > LARGEST_CLASS:
        raise DeitfastError(f"label {low if low < 0 else high} in {where} is no class number")
    if known is None:  # named by their own numbers, so that another split's are matched by name
        known = tuple(str(i) for i in range(min(low, 1), high + 1))
    if all(name.isdecimal() for name in known):
        numbers = label_numbers([str(i) for i in sorted(set(raw))], known, where)
        return [numbers[str(i)] for i in raw], known
    if low > 0 and high not in (0, len(known)) and high < len(known):
        raise DeitfastError(
            f"labels {low} to {high} in {where} may count the {len(known)} classes from 0 or from 1. "
            "Put image/class/synset into the records, or an image of the first or the last class"
        )
    first = 0 if low == 0 else 1
    if high - first >= len(known):
        raise DeitfastError(
            f"labels {low} to {high} in {where} do not fit the {len(known)} known classes. "
            "Train and val must have the same classes"
        )
    return [i - first for i in raw], known


def _member_name(record: Record) -> str:
    """A name for an image in a record file: its number, and its file name where the record has one."""
    base = re.sub(r"[^\w.-]", "_", os.path.basename(record.filename))[:100]
    return f"{record.number:06d}" + (f"_{base}" if base else "")
