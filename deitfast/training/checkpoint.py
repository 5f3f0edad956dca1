"""Checkpoints: atomic, checked, exact, and free of pickled code.

A checkpoint is a folder `step-0015012/` of safetensors files, a state.json, and a manifest.json with the size and
sha256 of each. It is written under a temporary name, every file and then the folder is fsynced, and it is renamed:
after a crash at any instant a checkpoint is whole or absent. Silent corruption is found by the hashes, because a
flipped bit loads without complaint otherwise; the newest whole checkpoint before it is used instead.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from deitfast.errors import DeitfastError
from deitfast.files import fsync, write_atomically
from deitfast.integrity import MANIFEST, damage, sha256, step_of, steps_newest_first, write_hashes

_NEWEST = 2  # that stay: the newest, and the one before for the day the newest turns out damaged


@dataclass(frozen=True)
class Checkpoint:
    """One training state. tensors: file stem ("model", "ema", "optim") -> tensor name -> tensor. state: plain JSON.

    identity: hash of the manifest of the one that was loaded.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    identity: str = ""


def save(folder: Path, checkpoint: Checkpoint, keep_every: int = 0) -> Path:
    """Write `checkpoint` as `folder/step-NNNNNNN`, point `folder/latest` to it, drop all but the newest two.

    keep_every: steps of whose every multiple the checkpoint stays, too; 0: of none. None is dropped before the new one
    has been read back whole. A failure (OSError, SafetensorError) leaves nothing of the new one behind, and all others
    as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".tmp-*"):  # of a process that was killed: a checkpoint's folder, or the file of `latest`
        _remove(stale)
    target = folder / f"step-{checkpoint.step:07d}"
    temporary = folder / f".tmp-{target.name}"
    try:
        _write(temporary, checkpoint)
        if target.exists():  # a damaged one of the same step, which resume passed over
            shutil.rmtree(target)
        os.rename(temporary, target)
        write_atomically(folder / "latest", lambda path: path.write_text(target.name))
    finally:
        _remove(temporary)
    older = steps_newest_first(folder)[_NEWEST:]
    surplus = [path for path in older if not (keep_every and step_of(path) % keep_every == 0)]
    if surplus and damage(target) is None:
        for old in surplus:
            shutil.rmtree(old)
    return target


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    for stem, tensors in checkpoint.tensors.items():
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, folder / f"{stem}.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1))
    write_hashes(folder)
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_newest(
    folder: Path, say: Callable[[str], None], *, stems: Collection[str] = (), before: int | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint under `folder`, on the CPU; None where there is none at all.

    stems: the tensor files it must hold. before: only checkpoints of earlier steps count. Damaged ones are passed over,
    each named through `say` with the steps lost. DeitfastError where all are damaged: a run never starts again from
    zero in silence.
    """
    problems: list[tuple[Path, str]] = []
    for path in steps_newest_first(folder):
        if before is not None and step_of(path) >= before:
            continue
        problem = damage(path) or _incomplete(path, stems)
        if problem is None:
            for bad, what in problems:
                lost = step_of(bad) - step_of(path)
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
    return Checkpoint(state["step"], tensors, state, identity=sha256(path / MANIFEST))


def _incomplete(path: Path, stems: Collection[str]) -> str | None:
    """What the checkpoint `path`, whose files are as they were written, lacks to be resumed from; None if nothing."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        best, steps_per_epoch = state["best"], state["steps_per_epoch"]
        if state["step"] != step_of(path) or type(steps_per_epoch) is not int or steps_per_epoch < 1:
            return f"state.json speaks of step {str(state['step'])[:20]}"
        if best is not None and not isinstance(best["top1"], (int, float)):
            return "state.json has no accuracy of the best weights"
    except FileNotFoundError:
        return "state.json missing"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        return f"state.json unreadable ({type(error).__name__})"
    missing = next((stem for stem in stems if not (path / f"{stem}.safetensors").is_file()), None)
    return f"{missing}.safetensors missing" if missing else None
