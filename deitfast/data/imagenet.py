"""ImageNet as people have it, read in place: nothing is unpacked.

    ILSVRC2012_img_train.tar                    a tar of a thousand tars, one a synset
    ILSVRC2012_img_val.tar, or val/*.JPEG       flat; the labels lie in one of these, beside it or above:
        ILSVRC2012_devkit_t12.tar.gz            (also unpacked) numbers, and meta.mat, which says what they are
        LOC_val_solution.csv                    Kaggle's
        imagenet_2012_validation_synset_labels.txt
    ILSVRC/Data/CLS-LOC/{train,val}             as Kaggle packs it

An image inside a tar that is inside a tar still lies at one offset of the outer file.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deitfast.errors import DeitfastError, first_line

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
_DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
TRUTHS = (
    f"{_DEVKIT}.tar.gz", f"{_DEVKIT}/data/{_TRUTH}", _TRUTH, "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
)  # fmt: skip
REMEDY = f"Put {_DEVKIT}.tar.gz (of the same download) or Kaggle's LOC_val_solution.csv beside it"
_SYNSET = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})")
_LEVELS = 4


def find_truth(folder: Path) -> Path | None:
    """The file with the validation images' labels: in a folder or in one above it."""
    for level in (folder, *list(folder.parents)[:_LEVELS]):
        for name in TRUTHS:
            if (level / name).is_file():
                return level / name
    return None


def synset_of(name: str, truth: dict[str, str] | Sequence[str] | None) -> str | None:
    """The synset of a validation image: from its own name (`..._n01751747.JPEG`), or from the labels."""
    own = _SYNSET.search(name)
    if own:
        return own[0]
    stem, number = os.path.splitext(os.path.basename(name))[0], _NUMBER.search(name)
    if isinstance(truth, dict):
        return truth.get(stem)
    if truth is None or number is None or not 0 < int(number[1]) <= len(truth):
        return None
    return truth[int(number[1]) - 1]


def read_truth(path: Path) -> dict[str, str] | list[str]:
    """Synsets by image name, or in the order of the images' numbers. Raises DeitfastError."""
    try:
        if path.suffix == ".csv":
            rows = csv.reader(io.StringIO(path.read_text()))
            return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and _SYNSET.match(row[1])}
        if path.name == TRUTHS[-1]:
            return path.read_text().split()
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as tar:
                members = {os.path.basename(member.name): member for member in tar if member.isreg()}
                truth, meta = (tar.extractfile(members[name]) for name in (_TRUTH, "meta.mat"))
                assert truth is not None
                assert meta is not None
                return _by_devkit(truth.read().decode(), meta.read())
        return _by_devkit(path.read_text(), (path.parent / "meta.mat").read_bytes())
    except DeitfastError:
        raise
    except (OSError, KeyError, ValueError, IndexError, tarfile.TarError, EOFError) as error:
        raise DeitfastError(f"{path} holds no labels that can be read: {first_line(error)}. {REMEDY}") from error


def _by_devkit(truth: str, meta: bytes) -> list[str]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DeitfastError(
            "meta.mat of ImageNet's devkit is a MATLAB file. Reading it needs pip install 'deitfast[imagenet]'; or put "
            "Kaggle's LOC_val_solution.csv beside the images"
        ) from None
    rows = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
    synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows.reshape(-1)}
    return [synsets[int(line)] for line in truth.split()]


def nested_members(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """(synset, name, offset, length) of every image of a tar of tars, the offset being that in the outer file."""
    with tarfile.open(path, "r:") as outer:
        for info in outer:
            if not info.isreg() or not info.name.endswith(".tar"):
                continue
            file = outer.extractfile(info)
            assert file is not None
            synset = os.path.basename(info.name).removesuffix(".tar")
            with tarfile.open(fileobj=file, mode="r:") as inner:
                for member in inner:
                    if member.isreg():
                        yield synset, f"{synset}/{member.name}", info.offset_data + member.offset_data, member.size


def flat_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of every file of a tar."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg():
                yield member.name, member.offset_data, member.size
