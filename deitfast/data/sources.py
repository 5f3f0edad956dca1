"""Where images come from: class folders, tar shards or TFRecords, found under one folder, turned into manifests.

    folder/train/<class>/*.jpg         folder/val/<class>/*.jpg        (or `valid`, `validation`, `test`)
    folder/train/*.tar, train-*.tar, train.tar                         (likewise for val; case does not matter)
    ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, Kaggle's ILSVRC/  (`imagenet`)
    cifar-10-python.tar.gz, cifar-10-batches-py/, also binary          (`cifar`)
    folder/train-*.parquet, folder/data/train-*.parquet                (`parquet`)
    folder/train/*.tfrecord, train-00000-of-01024, train*.tfrecord     (likewise for val)

What the files hold is told in `indexing`. Shards and records are read in place by offset; nothing is unpacked. Beside
shards that `deitfast data prepare` made lies their manifest, `<split>.manifest.npz`, which saves the scan.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deitfast.data import cifar
from deitfast.data.files import images_below, is_hidden
from deitfast.data.imagenet import KAGGLE, TRAIN_TAR, VAL_TAR, find_truth
from deitfast.data.indexing import Source, entries_of, label_numbers, names_files
from deitfast.data.manifest import Manifest, bad_list, digest, load, prepared, relabelled, store
from deitfast.data.scan import report_bad, scan
from deitfast.data.tfrecord import is_tfrecord
from deitfast.errors import DeitfastError, did_you_mean, say

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing", "eval")}
_SPLIT_NAMES = sum(_SPLITS.values(), ())
_LAYOUTS = "Give a folder with train/<class>/* and val/<class>/*, tar shards, or TFRecords"
PACKAGED = {"digits": Path(__file__).parent / "digits"}


@dataclass(frozen=True)
class Dataset:
    """The splits that were found and their common class names, in label order."""

    train: Manifest | None
    val: Manifest | None
    classes: tuple[str, ...]

    def splits(self) -> dict[str, Manifest]:
        """Those that there are, by name."""
        return {name: manifest for name, manifest in (("train", self.train), ("val", self.val)) if manifest is not None}

    def shortcomings(self) -> list[str]:
        """What makes scores say less than they seem to, a line each."""
        found = []
        if self.train is not None and len(self.classes) == 1:
            found.append(f"{self.train.root} has one class only, {self.classes[0]}: any answer will be right")
        if self.train is not None and self.val is not None:
            unseen = [name for i, name in enumerate(self.classes) if not (self.val.label == i).any()]
            if unseen:
                few = ", ".join(unseen[:3]) + (", ..." if len(unseen) > 3 else "")
                found.append(f"{len(unseen)} of {len(self.classes)} classes have no validation image: {few}")
        return found


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
    val = None if split == "train" else _find(root, "val") or (_class_folders(root, "val") if split == "val" else None)
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
    dataset = Dataset(train_manifest, val_manifest, found.classes)
    if not quiet and split is None:
        for line in dataset.shortcomings():
            say(line)
    return dataset


def _root(data: str) -> Path:
    if data in PACKAGED:
        return PACKAGED[data]
    root = Path(data).expanduser()
    if batches := cifar.find(root):
        return cifar.shards(batches)
    if root.is_dir():
        return root.resolve()
    if root.exists():
        raise DeitfastError(f"data {data} is a file. Give the folder that holds it, with train.tar and val.tar")
    hint = ""
    if root.parent.is_dir():
        names = [p.name for p in root.parent.iterdir() if p.is_dir()]
        hint = did_you_mean(root.name, names + (list(PACKAGED) if os.sep not in data else []))
    raise DeitfastError(f"data folder {data} not found.{hint or ' ' + _LAYOUTS}")


def _find(root: Path, split: str) -> Source | None:
    """The split under root, or None where nothing bears its name."""
    there = sorted(p.name for p in root.iterdir() if not is_hidden(p.name))
    for name in _SPLITS[split]:
        # By any case; that of the name itself first, should there be two.
        folder = root / next((n for n in sorted(there, key=lambda n: n != name) if n.lower() == name), name)
        shard = re.compile(rf"{name}([-_.].*)?\.tar", re.IGNORECASE)
        inside = (p for p in folder.iterdir() if p.suffix == ".tar") if folder.is_dir() else ()
        shards = sorted(p for p in inside if not is_hidden(p.name)) or [root / n for n in there if shard.fullmatch(n)]
        if shards:
            return Source(root, tuple(str(p.relative_to(root)) for p in shards), "tar", split)
        records = [
            p for pattern in ("*.tfrecord*", "*-of-*") for p in (*folder.glob(pattern), *root.glob(name + pattern))
        ]
        records = sorted(p for p in set(records) if p.suffix not in (".idx", ".parquet") and p.is_file())
        if records:
            strange = next((p for p in records if not is_tfrecord(p)), None)
            if strange is not None:
                raise DeitfastError(f"{strange} is not an uncompressed TFRecord file. Unpack it, or remove it")
            return Source(root, tuple(str(p.relative_to(root)) for p in records), "tfrecord", split)
        if folder.is_dir():
            source = _class_folders(folder, split) or _flat(folder, split)
            if source is None:
                raise _not_found(folder, split)
            return source
    return _downloaded(root, split, there)


def _downloaded(root: Path, split: str, there: list[str]) -> Source | None:
    """A split of ImageNet's official tars, of Kaggle's folders or of Hugging Face's parquet shards."""
    official = TRAIN_TAR if split == "train" else VAL_TAR
    if official in there:
        return Source(root, (official,), "nested", split) if split == "train" else _with_truth(root, (official,))
    if (root / KAGGLE).is_dir():
        return _find(root / KAGGLE, split)
    pattern = re.compile(rf"({'|'.join(_SPLITS[split])})-.*\.parquet")
    for folder in (root, root / "data"):
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if found := tuple(os.path.relpath(folder / n, root) for n in names if pattern.fullmatch(n)):
            return Source(root, found, "parquet", split)
    return None


def _flat(folder: Path, split: str) -> Source | None:
    """ImageNet's validation images as their tar unpacks: all in one folder."""
    names = sorted(p.name for p in folder.iterdir() if p.name.startswith("ILSVRC2012_val_") and not p.is_dir())
    return _with_truth(folder, tuple(names)) if names and split == "val" else None


def _with_truth(root: Path, paths: tuple[str, ...]) -> Source:
    truth = find_truth(root)
    return Source(root, paths, "flat", "val", truth=os.path.relpath(truth, root) if truth else "")


def _class_folders(root: Path, split: str) -> Source | None:
    """The images of the class folders right below root, or None where there are no folders."""
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    if not folders:
        return None
    paths: list[str] = []
    empty = []
    for name in folders:
        inside = sorted(os.path.relpath(path, root) for path in images_below(root / name))
        paths += inside
        if not inside:
            empty.append(name)
    if not paths:
        raise DeitfastError(f"no images in the {len(folders)} class folders of {root}. {_LAYOUTS}")
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise DeitfastError(f"class folder {root / empty[0]}{more} has no images. Fill it or remove it")
    return Source(root, tuple(paths), "folders", split)


def _not_found(root: Path, split: str) -> DeitfastError:
    """What is there instead, and what would do."""
    names = sorted(p.name for p in root.iterdir() if not p.name.startswith("."))
    there = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "nothing"
    hint = ""
    packed = [n for n in names if n.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip"))]
    if packed:
        hint = f" Unpack {packed[0]}, or repack it as plain tar."
    folders = [p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name)]
    if (root.name.lower() in _SPLIT_NAMES or split == "train") and not hint:
        if root.name.lower() in _SPLIT_NAMES and folders:
            return DeitfastError(f"{root} is one split of a set. Give the folder above it, {root.parent}")
        deeper = next((p for p in folders if any(n.name.lower() in _SPLITS["train"] for n in p.iterdir())), None)
        if deeper is not None:
            return DeitfastError(f"no {split} split in {root}; found {there}. Give {deeper}, which has one")
    if root.name.lower() in _SPLIT_NAMES:
        return DeitfastError(f"no class folders in {root}; found {there}.{hint} {_LAYOUTS}")
    return DeitfastError(f"no {split} split in {root}; found {there}.{hint} {_LAYOUTS}")


def _open(source: Source, known: tuple[str, ...] | None, quiet: bool) -> Manifest:
    """The source's manifest with labels by `known` (by its own names if None): made before, or now by a scan."""
    manifest = _prepared(source)
    if manifest is not None:
        if known is None or known == manifest.classes:
            return manifest
        return relabelled(manifest, known, label_numbers(manifest.classes, known, manifest.root))
    key = _key(source, known)
    manifest = load(key)
    if manifest is None or manifest.root != str(source.root):
        manifest = scan(source.root, entries_of(source, known), quiet)
        store(key, manifest)
    if not quiet:
        report_bad(manifest, bad_list(key))
    if len(manifest) == 0:
        raise DeitfastError(f"none of the {len(manifest.bad)} images of {source.root} is readable ({bad_list(key)})")
    return manifest


def _prepared(source: Source) -> Manifest | None:
    """The manifest beside the shards, where there is one that fits them."""
    if source.kind != "tar":
        return None
    return prepared(source.root / f"{source.split}.manifest.npz", source.root, source.paths)


def _key(source: Source, known: tuple[str, ...] | None) -> str:
    beside = (p for p in names_files(source) if (source.root / p).is_file())
    return digest(source.root, (*source.paths, *beside), known or ())


def _classes_of(source: Source) -> tuple[str, ...]:
    """The source's own class names, without decoding an image."""
    if source.kind == "folders":
        return tuple(sorted({path.split(os.sep, 1)[0] for path in source.paths}))
    known = _prepared(source) or load(_key(source, None))
    return (known or entries_of(source, None)).classes
