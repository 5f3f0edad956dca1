"""Copies of the data on a local disk: read where they are whole, passed over where not, never in a run's way."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deitfast.data import Manifest, open_dataset, staging
from deitfast.data.manifest import strings
from deitfast.data.staging import Stage, staged
from deitfast.errors import DeitfastError
from tests.data.test_sources import pack


def open_packed(make_folder, tmp_path: Path) -> Manifest:
    pack(make_folder() / "train", tmp_path / "packed" / "train.tar")
    return open_dataset(str(tmp_path / "packed"), split="train", quiet=True).train


def stage(manifest: Manifest, folder: Path) -> tuple[Manifest, str]:
    """The staged manifest, once all is copied, and what was said."""
    said: list[str] = []
    manifest = staged(manifest, folder)
    copying = Stage([manifest], said.append)
    copying.join()
    copying.close()
    return manifest, "\n".join(said)


def everything(manifest: Manifest) -> list[bytes]:
    return [manifest.read(i).tobytes() for i in range(len(manifest))]


def copies(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_copied_is_read_when_the_data_is_gone(make_folder, tmp_path, packed):
    manifest = open_packed(make_folder, tmp_path) if packed else open_dataset(str(make_folder())).train
    before, files = everything(manifest), len(manifest.files)
    copied, said = stage(manifest, tmp_path / "stage")
    assert f"staged {files} of {files} files, {files} copied" in said
    again, said = stage(manifest, tmp_path / "stage")
    assert said == f"staged {files} of {files} files"  # none copied again
    for path in copies(Path(manifest.root)):
        path.unlink()
    assert everything(copied) == everything(again) == before
    with pytest.raises(DeitfastError, match="cannot read"):
        everything(replace(open_dataset_again(manifest), staged=""))


def open_dataset_again(manifest: Manifest) -> Manifest:
    """The same manifest without the shards that it holds open."""
    return replace(manifest, _shards=type(manifest._shards)())


def test_a_copy_that_is_damaged_cut_or_missing_is_passed_over(make_folder, tmp_path):
    manifest, _ = stage(open_dataset(str(make_folder())).train, tmp_path / "stage")
    flipped, cut, gone, *_ = copies(tmp_path / "stage")
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"?")
    os.truncate(cut, 50)
    gone.unlink()
    assert everything(manifest) == everything(replace(manifest, staged=""))
    _, said = stage(replace(manifest, staged=""), tmp_path / "stage")
    assert ", 3 copied" in said


def test_a_disk_that_is_too_small_is_told_and_nothing_is_lost(make_folder, tmp_path, monkeypatch):
    manifest = open_packed(make_folder, tmp_path)
    monkeypatch.setattr(staging, "SPARE", 1.0)
    copied, said = stage(manifest, tmp_path / "stage")
    assert said.startswith("staged 0 of 1 files; ")
    assert "GB left of" in said
    assert said.endswith("The others are read where they are")
    assert everything(copied) == everything(manifest)
    assert not copies(tmp_path / "stage")


def test_a_run_that_ends_early_leaves_no_half_copy_and_old_ones_are_swept(make_folder, tmp_path, monkeypatch):
    manifest = staged(open_packed(make_folder, tmp_path), tmp_path / "stage")
    for name, age in ((".tmp-killed", 2 * staging._STALE_S), (".tmp-at-work", 0.0)):
        path = Path(manifest.staged) / name
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(staging, "_CHUNK", 100)
    said: list[str] = []
    copy = Stage._copy

    def ended(self, *given):
        self._ended.set()
        copy(self, *given)

    monkeypatch.setattr(Stage, "_copy", ended)
    Stage([manifest], said.append).join()
    assert [path.name for path in copies(tmp_path / "stage")] == [".tmp-at-work"]
    assert said == []


def test_a_crafted_list_of_files_writes_nothing_elsewhere(make_folder, tmp_path):
    manifest = open_dataset(str(make_folder())).train
    outside = tmp_path / "set" / "outside.jpg"
    outside.write_bytes(b"x")
    crafted = replace(manifest, files=strings(["../../set/outside.jpg", str(outside)]))
    before = copies(tmp_path)
    _, said = stage(crafted, tmp_path / "stage")
    assert said == "staged 0 of 0 files"
    assert copies(tmp_path) == before
