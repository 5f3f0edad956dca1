"""What files on a disk say about themselves: sizes and hashes of a folder's files, and which checkpoint is the newest.

A flipped bit in a tensor file loads without complaint, so whoever uses one compares it with what was written. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"
"""In a folder: {file name: {"bytes": size, "sha256": hash}}."""

_STEP = re.compile(r"step-(\d{1,15})")
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_all(paths: Iterable[Path]) -> str:
    """sha256 of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def write_hashes(folder: Path) -> None:
    """Write the manifest of the files in `folder`."""
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with the files that the manifest of `folder` lists ("optim.safetensors sha256 mismatch"), or None.

    A folder without a readable manifest is damaged.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_bytes())
        if not entries:
            return f"{MANIFEST} lists nothing"
        return next((found for name in entries if (found := _compare(folder / name, entries[name]))), None)
    except FileNotFoundError:
        return f"{MANIFEST} missing"
    except _UNREADABLE as error:
        return f"{MANIFEST} unreadable ({type(error).__name__})"


def file_damage(path: Path) -> str | None:
    """What is wrong with one file by the manifest beside it; None where it is whole or none speaks of it."""
    try:
        entry = json.loads((path.parent / MANIFEST).read_bytes()).get(path.name)
        return None if not isinstance(entry, dict) or "sha256" not in entry else _compare(path, entry)
    except FileNotFoundError:
        return None
    except _UNREADABLE as error:
        return f"{MANIFEST} beside it unreadable ({type(error).__name__})"


def steps_newest_first(folder: Path) -> list[Path]:
    """The checkpoints `step-NNNNNNN` in `folder`, unchecked."""
    paths = [p for p in folder.glob("step-*") if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def pointed_to(folder: Path) -> Path | None:
    """The checkpoint that `folder/latest` names; the newest where it names none, None where there is none."""
    try:
        name = (folder / "latest").read_bytes()[:100].decode().strip()
    except (OSError, ValueError):
        name = ""
    if _STEP.fullmatch(name) and (folder / name).is_dir():
        return folder / name
    return next(iter(steps_newest_first(folder)), None)


def _compare(file: Path, entry: dict) -> str | None:
    if not file.is_file():
        return f"{file.name} missing"
    if file.stat().st_size != entry["bytes"]:
        return f"{file.name} has {file.stat().st_size} of {entry['bytes']} bytes"
    return None if sha256(file) == entry["sha256"] else f"{file.name} sha256 mismatch"
