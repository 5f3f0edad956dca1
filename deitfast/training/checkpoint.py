"""Checkpoints: atomic, checked, exact, and free of pickled code.

A checkpoint is a folder `step-0015012/` of safetensors files, a state.json, and a manifest.json with the size and
sha256 of each. It is written under a temporary name, every file and then the folder is fsynced, and it is renamed:
after a crash at any instant a checkpoint is whole or absent. Silent corruption is found by the hashes, because a
flipped bit loads without complaint otherwise; the newest whole checkpoint before it is used instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from deitfast.errors import DeitfastError
from deitfast.files import fsync, write_atomically

KEEP = 2
"""Checkpoints kept: the newest, and the one before for the day the newest turns out damaged."""

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One training state. tensors: file stem ("model", "ema", "optim") -> tensor name -> tensor. state: plain JSON."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` as `folder/step-NNNNNNN`, point `folder/latest` to it, drop all but the newest `KEEP`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):  # of a process that was killed: a checkpoint's folder, or the file of `latest`
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    target = folder / f"step-{checkpoint.step:07d}"
    temporary = folder / f".tmp-{target.name}"
    temporary.mkdir()
    for stem, tensors in checkpoint.tensors.items():
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary / f"{stem}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1))
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
    (temporary / _MANIFEST).write_text(json.dumps(entries, indent=1))
    for path in temporary.iterdir():
        fsync(path)
    fsync(temporary)
    if target.exists():  # a damaged one of the same step, which resume passed over
        shutil.rmtree(target)
    os.rename(temporary, target)
    write_atomically(folder / "latest", lambda path: path.write_text(target.name))
    for old in _newest_first(folder)[KEEP:]:
        shutil.rmtree(old)
    return target


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`, on the CPU; None where there is none at all.

    Damaged ones are passed over, each named through `say` with the steps lost. DeitfastError where all are damaged: a
    run never starts again from zero in silence.
    """
    candidates = _newest_first(folder)
    problems: list[tuple[Path, str]] = []
    for path in candidates:
        problem = damage(path)
        if problem is None:
            for bad, what in problems:
                lost = _step_of(bad) - _step_of(path)
                say(f"{bad.name}/{what}. Using {path.name} ({lost} steps lost)")
            return load(path)
        problems.append((path, problem))
    if problems:
        listed = "; ".join(f"{path.name}/{what}" for path, what in problems)
        raise DeitfastError(f"every checkpoint in {folder} is damaged: {listed}. Restore one, or change --out")
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint in folder `path`, unchecked."""
    state = json.loads((path / "state.json").read_text())
    tensors = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint folder `path` ("optim.safetensors sha256 mismatch"), or None."""
    try:
        entries = json.loads((path / _MANIFEST).read_text())
        for name, entry in entries.items():
            file = path / name
            if not file.is_file():
                return f"{name} missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} of {entry['bytes']} bytes"
            if _sha256(file) != entry["sha256"]:
                return f"{name} sha256 mismatch"
        return None if "state.json" in entries else "state.json missing"
    except FileNotFoundError:
        return f"{_MANIFEST} missing"
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        return f"{_MANIFEST} unreadable ({type(error).__name__})"


def _newest_first(folder: Path) -> list[Path]:
    paths = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
