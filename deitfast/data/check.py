"""`deitfast data check`: what is wrong with a set of images, before a run meets it."""

from __future__ import annotations

import io
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deitfast.data.cores import cores
from deitfast.data.files import SUFFIXES
from deitfast.data.manifest import FORMATS, Manifest
from deitfast.data.sources import Dataset
from deitfast.errors import DeitfastError

_SHOWN = 10
_ORIENTATION = 0x0112  # of EXIF


@dataclass
class SplitReport:
    """Findings of one split; every image by name. Only `damaged` keeps images out of training."""

    images: int
    damaged: list[tuple[str, str]]  # (name, reason)
    tiny: list[tuple[str, int, int]]  # (name, width, height)
    huge: list[tuple[str, int, int]]
    wrong_suffix: list[tuple[str, str]]  # (name, format)
    duplicates: list[list[str]]  # groups of the same bytes
    conflicts: list[list[str]]  # those of them with different labels
    rotated: list[str]  # whose EXIF tag asks viewers to turn them, which training and evaluation do not


@dataclass
class Report:
    """Findings of all splits. leaks: (name in train, name in val) of the same bytes."""

    splits: dict[str, SplitReport]
    leaks: list[tuple[str, str]] = field(default_factory=list)
    shortcomings: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> int:
        return sum(len(split.damaged) for split in self.splits.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"damaged": self.damaged, "leaks": self.leaks, "shortcomings": self.shortcomings} | {
            name: vars(split) for name, split in self.splits.items()
        }

    def lines(self) -> list[str]:
        """For a person: counts, and the first few names of each finding."""
        lines = []
        for name, split in self.splits.items():
            lines.append(f"{name}: {split.images:,} images, {len(split.damaged):,} damaged")
            findings: list[tuple[str, list[str]]] = [
                ("damaged", [f"{file}: {reason}" for file, reason in split.damaged]),
                ("tiny", [f"{file}: {width} x {height}" for file, width, height in split.tiny]),
                ("huge", [f"{file}: {width} x {height}" for file, width, height in split.huge]),
                ("wrong suffix", [f"{file} is a {kind}" for file, kind in split.wrong_suffix]),
                ("duplicate", [" = ".join(group) for group in split.duplicates]),
                ("duplicate with another label", [" = ".join(group) for group in split.conflicts]),
                ("turned by EXIF for viewers, not for training", split.rotated),
            ]
            for kind, found in findings:
                lines += _listed(kind, found)
        if len(self.splits) > 1:
            lines.append(f"{len(self.leaks):,} validation images are in the training set, too")
            lines += _listed("leak", [f"{train} = {val}" for train, val in self.leaks])
        return lines + self.shortcomings


def check_dataset(data: Dataset, tiny: int = 32, huge: int = 25_000_000) -> Report:
    """Findings about both splits. tiny: sides below so many pixels; huge: areas above so many.

    Every file is read and its checksum compared, also where an earlier scan is known: damage need not change a file's
    time or size.
    """
    splits = {name: _check_split(manifest, tiny, huge) for name, manifest in data.splits().items()}
    report = Report(splits, shortcomings=data.shortcomings())
    if data.train is not None and data.val is not None:
        first = {int(c): i for i, c in reversed(list(enumerate(data.train.checksum.tolist())))}
        report.leaks = [
            (data.train.name(first[c]), data.val.name(j))
            for j, c in enumerate(data.val.checksum.tolist())
            if c in first
        ]
    return report


def _check_split(m: Manifest, tiny: int, huge: int) -> SplitReport:
    def sized(chosen: np.ndarray) -> list[tuple[str, int, int]]:
        return [(m.name(i), int(m.width[i]), int(m.height[i])) for i in np.flatnonzero(chosen).tolist()]

    wrong = []
    for i in range(len(m)):
        kind = FORMATS[m.format[i]]
        # A record's name need not end in a suffix at all; one that does should be right.
        if SUFFIXES.get(os.path.splitext(m.name(i))[1].lower(), kind) != kind:
            wrong.append((m.name(i), kind))
    same: dict[int, list[int]] = defaultdict(list)
    for i, value in enumerate(m.checksum.tolist()):
        same[value].append(i)
    groups = [group for group in same.values() if len(group) > 1]
    changed, rotated = _read_all(m)
    return SplitReport(
        images=len(m) + len(m.bad),
        damaged=[*m.bad, *changed],
        tiny=sized(np.minimum(m.width, m.height) < tiny),
        huge=sized(m.width * m.height > huge),
        wrong_suffix=wrong,
        duplicates=[[m.name(i) for i in group] for group in groups],
        rotated=[m.name(i) for i in rotated],
        conflicts=[[m.name(i) for i in group] for group in groups if len(set(m.label[group].tolist())) > 1],
    )


def _read_all(m: Manifest) -> tuple[list[tuple[str, str]], list[int]]:
    """(name, reason) of images whose bytes are no longer the scan's, and the numbers of those that EXIF turns."""

    def look(i: int) -> str | bool:
        try:
            return _is_turned(m.read(i))
        except DeitfastError as error:
            return str(error)

    with ThreadPoolExecutor(cores()) as pool:
        found = list(enumerate(pool.map(look, range(len(m)))))
    return [(m.name(i), what) for i, what in found if isinstance(what, str)], [i for i, what in found if what is True]


def _is_turned(data: np.ndarray) -> bool:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.data), formats=FORMATS) as image:
            return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # a broken tag turns nothing
        return False


def _listed(kind: str, found: list[str]) -> list[str]:
    lines = [f"  {kind}: {text}" for text in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  {kind}: {len(found) - _SHOWN:,} more (--json lists all)")
    return lines
