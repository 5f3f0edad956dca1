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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deitfast.data import imagenet, parquet
from deitfast.data.files import begins_as_image, is_hidden, named_as_image
from deitfast.data.scan import Entries, Entry
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

    kind: folders, tar, tfrecord or parquet; nested (a tar of tars, one a class) or flat (files, or members of one tar,
    without class folders: ImageNet's validation images). truth: the file with a flat split's labels, relative to root.
    """

    root: Path
    paths: tuple[str, ...]
    kind: str
    split: str
    truth: str = ""

    @property
    def where(self) -> str:
        """What errors call it."""
        if self.kind in ("folders", "flat"):
            return str(self.root)
        return f"{self.root / self.paths[0]}" + (f" (of {len(self.paths)})" if len(self.paths) > 1 else "")


def entries_of(source: Source, known: tuple[str, ...] | None) -> Entries:
    """The images of a source, labelled by the class names `known` (by its own if None)."""
    index = {
        "folders": _folder_entries, "tar": _shard_entries, "tfrecord": _record_entries, "nested": _nested_entries,
        "flat": _flat_entries, "parquet": _parquet_entries,
    }[source.kind]  # fmt: skip
    return index(source, known)


def names_files(source: Source) -> list[str]:
    """Where a list of class names may lie, beside the shards."""
    if source.kind in ("folders", "nested"):
        return []
    if source.kind == "flat":
        return [source.truth] if source.truth else []
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


def _listed_names(source: Source) -> tuple[str, ...] | None:
    """The lines of the list of class names beside the files, if there is one."""
    listed = next((source.root / p for p in names_files(source) if (source.root / p).is_file()), None)
    if listed is None:
        return None
    return tuple(line.strip() for line in listed.read_text().splitlines() if line.strip())


def _by_name(
    source: Source, images: Sequence[Entry], known: tuple[str, ...] | None, bad: Sequence[tuple[str, str]] = ()
) -> Entries:
    """Labels from the names of the images' classes."""
    found = sorted({image.class_name for image in images})
    names = known or tuple(found)
    number = label_numbers(found, names, source.where)
    return Entries(source.paths, images, [number[image.class_name] for image in images], names, bad)


def _numbers(source: Source, images: Sequence[Entry], lacking: str) -> list[int]:
    """The integer labels of the images. An error names the first without one, or with one that cannot be."""
    labels = []
    for image in images:
        where = f"{image.member} in {source.root / source.paths[image.file]}"
        if image.label is None:
            raise DeitfastError(f"{where} has no {lacking}")
        if not 0 <= image.label <= LARGEST_CLASS:
            raise DeitfastError(f"label {image.label} of {where} is no class number")
        labels.append(image.label)
    return labels


@contextmanager
def _reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Names a tar file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise DeitfastError(f"cannot read {path}: {error.strerror or error}") from error
    except _TAR_ERRORS as error:
        raise DeitfastError(f"{path} is not a {what} ({error}). {remedy}") from error


def _folder_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    images = [Entry(i, class_name=path.split(os.sep, 1)[0]) for i, path in enumerate(source.paths)]
    return _by_name(source, images, known)


def _shard_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    """Index the shards by their headers. Labels: integers where the images have them, else class folders."""
    images = [image for i, path in enumerate(source.paths) for image in _read_headers(source.root / path, i)]
    if not images:
        raise DeitfastError(
            f"no images in {source.where}. Give shards of key.jpg beside key.cls, or of <class>/name.jpg"
        )
    known = known or _listed_names(source)
    if all(image.label is None for image in images):
        bare = next((image for image in images if not image.class_name), None)
        if bare is None:
            return _by_name(source, images, known)
        raise DeitfastError(
            f"{bare.member} in {source.root / source.paths[bare.file]} has no label. "
            "Put key.cls or key.json beside each image, or use class folders inside the shard"
        )
    labels = _numbers(source, images, ".cls or .json, others have. Label all of them or none")
    names = known or tuple(map(str, range(max(labels) + 1)))
    outside = next((image for image, label in zip(images, labels, strict=True) if label >= len(names)), None)
    if outside is not None:
        raise DeitfastError(
            f"label {outside.label} of {outside.member} in {source.root / source.paths[outside.file]} is outside "
            f"the {len(names)} known classes. Train and val must have the same classes"
        )
    return Entries(source.paths, images, labels, names)


def _read_headers(path: Path, shard: int) -> list[Entry]:
    """The images of one tar file, sorted by name, with their labels."""
    images: dict[str, Entry] = {}
    labels: dict[str, int] = {}
    end = 0
    with _reading(path, "whole, uncompressed tar file", "Repack it"), tarfile.open(path, "r:") as tar:
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
                images[info.name] = Entry(shard, info.name, info.offset_data, info.size, class_name=folder)
            elif is_label:
                file = tar.extractfile(info)
                assert file is not None
                label = _parse_label(file.read(_LARGEST_LABEL), base.endswith(".json"), f"{info.name} in {path}")
                if label is not None:
                    labels[os.path.splitext(info.name)[0]] = label
    return [images[name]._replace(label=_label_of(name, labels)) for name in sorted(images)]


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


def _record_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    """Index TFRecord files. Labels: synsets where the records name them, else their integers."""
    images: list[Entry] = []
    bad: list[tuple[str, str]] = []
    for i, path in enumerate(source.paths):
        records, damaged = read_records(source.root / path)
        images += [Entry(i, _member_name(r), r.offset, r.length, r.label, r.synset) for r in records]
        bad += [(f"{path}/{name}", reason) for name, reason in damaged]
    if not images:
        raise DeitfastError(
            f"no images in {source.where}. Records need the features image/encoded and image/class/label"
        )
    known = known or _listed_names(source)
    synsets = {image.class_name for image in images}
    if "" not in synsets and (known is None or synsets <= set(known)):
        return _by_name(source, images, known, bad)
    labels, names = _counted(_numbers(source, images, "image/class/label"), known, source.where)
    return Entries(source.paths, images, labels, names, bad)


def _counted(raw: list[int], known: tuple[str, ...] | None, where: str) -> tuple[list[int], tuple[str, ...]]:
    """Labels from 0 of records with integer labels, and the class names."""
    low, high = min(raw), max(raw)
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


# ImageNet as it is downloaded -----------------------------------------------------------------------------------------


def _nested_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    path = source.root / source.paths[0]
    with _reading(path, "whole tar of tars", "Download it again"):
        found = sorted(imagenet.nested_members(path))
    if not found:
        raise DeitfastError(f"no images in {path}. It should hold a tar of each synset: n01440764.tar, ...")
    images = [Entry(0, name, offset, length, class_name=synset) for synset, name, offset, length in found]
    return _by_name(source, images, known)


def _flat_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    path = source.root / source.paths[0]
    found = [Entry(i) for i in range(len(source.paths))]
    if path.suffix == ".tar":
        with _reading(path, "whole tar file", "Download it again"):
            found = [Entry(0, *member) for member in sorted(imagenet.flat_members(path))]
    truth = imagenet.read_truth(source.root / source.truth) if source.truth else None
    images = []
    for image in found:
        name = image.member or source.paths[image.file]
        synset = imagenet.synset_of(name, truth)
        if synset is None:
            told = f"{source.truth} says nothing of {name}" if truth else f"nothing labels {name} in {source.root}"
            raise DeitfastError(f"{told}. {imagenet.REMEDY}")
        images.append(image._replace(class_name=synset))
    return _by_name(source, images, known)


def _parquet_entries(source: Source, known: tuple[str, ...] | None) -> Entries:
    images: list[Entry] = []
    names: tuple[str, ...] | None = None
    for i, path in enumerate(source.paths):
        rows, stated = parquet.read_rows(source.root / path)
        names = names or stated
        images += [Entry(i, f"{n:08d}_{name}", n, label=label) for n, (name, label) in enumerate(rows)]
    if not images:
        raise DeitfastError(f"no images in {source.where}")
    labels = _numbers(source, images, "label. Leave that file out")
    count = max(labels) + 1
    names = names or _listed_names(source) or (known if known and count <= len(known) else None)
    names = names if names and count <= len(names) else tuple(map(str, range(count)))
    number = label_numbers(names, known or names, source.where)
    return Entries(source.paths, images, [number[names[label]] for label in labels], known or names)
