"""Manifests on disk: what comes back, and that no damaged or crafted file is believed."""

from __future__ import annotations

import io
import os
import random
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from deitfast.data import open_dataset
from deitfast.data.manifest import PER_IMAGE, read_manifest, write_manifest
from deitfast.data.scan import inspect_image
from deitfast.errors import DeitfastError
from deitfast.files import cache_folder
from tests.data.test_sources import add


@pytest.fixture
def manifest(make_folder):
    return open_dataset(str(make_folder(train=2, val=1))).train


def test_a_manifest_comes_back_as_it_was(manifest, tmp_path):
    named = replace(manifest, bad=(("x/y.jpg", "empty file"), ("z\udcff.jpg", "truncated")))
    write_manifest(tmp_path / "m.npz", named)
    again = read_manifest(tmp_path / "m.npz")
    assert (again.root, again.classes, again.bad) == (named.root, named.classes, named.bad)
    for name in ("files", *PER_IMAGE):
        assert np.array_equal(getattr(again, name), getattr(named, name))
        assert getattr(again, name).dtype == getattr(named, name).dtype
    assert read_manifest(tmp_path / "m.npz", tmp_path).root == str(tmp_path)
    assert read_manifest(tmp_path / "absent.npz") is None


def test_values_out_of_range_are_not_believed(manifest, tmp_path):
    for name, value in (
        ("file_id", 99), ("file_id", -1), ("offset", -5), ("length", -1), ("label", 3), ("label", -1),
        ("width", 0), ("height", 2**40), ("format", 4),
    ):  # fmt: skip
        array = getattr(manifest, name).copy()
        array[1] = value
        write_manifest(tmp_path / "m.npz", replace(manifest, **{name: array}))
        assert read_manifest(tmp_path / "m.npz") is None, name
    write_manifest(tmp_path / "m.npz", replace(manifest, label=manifest.label[:-1]))
    assert read_manifest(tmp_path / "m.npz") is None
    write_manifest(tmp_path / "m.npz", replace(manifest, width=manifest.width.astype(np.float64)))
    assert read_manifest(tmp_path / "m.npz") is None


@pytest.mark.parametrize(("member", "kind"), [("width.npy", "<i8"), ("classes.npy", "|S0")])
def test_a_member_that_claims_more_than_it_holds_takes_no_memory_nor_time(member, kind, manifest, tmp_path):
    write_manifest(tmp_path / "m.npz", manifest)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(tmp_path / "m.npz") as old, zipfile.ZipFile(tmp_path / "n.npz", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, header.getvalue() if info.filename == member else old.read(info))
    assert read_manifest(tmp_path / "n.npz") is None
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("width.npy", bytes(50_000_000))
    assert read_manifest(tmp_path / "bomb.npz") is None


def test_no_mutation_of_the_file_is_believed_or_fatal(manifest, tmp_path):
    write_manifest(tmp_path / "m.npz", manifest)
    whole, rng = (tmp_path / "m.npz").read_bytes(), random.Random(1)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "x.npz").write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        found = read_manifest(tmp_path / "x.npz")
        # The zip's own bookkeeping (times, modes) may change without harm; what is in the manifest may not.
        assert found is None or all(np.array_equal(getattr(found, n), getattr(manifest, n)) for n in PER_IMAGE)


def test_no_mutation_of_a_shard_or_an_image_is_fatal(make_folder, tmp_path):
    jpeg = (make_folder(train=1, val=1) / "train" / "ape" / "000.jpg").read_bytes()
    rng = random.Random(2)
    for kind in ("jpeg", "tar"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in range(2):
                add(tar, f"{i}.jpg", jpeg[:300])
                add(tar, f"{i}.cls", b"1")
        whole = jpeg if kind == "jpeg" else buffer.getvalue()
        for n in range(300):
            data = bytearray(whole)
            spots = list(range(0, len(whole), 1024)) if kind == "tar" else [0]
            for _ in range(rng.randint(1, 6)):
                data[min(rng.choice(spots) + rng.randrange(600), len(data) - 1)] = rng.randrange(256)
            if kind == "jpeg":
                try:
                    facts = inspect_image(bytes(data))
                    assert facts.width * facts.height <= 50_000_000
                except ValueError:
                    pass
                continue
            folder = tmp_path / str(n)
            folder.mkdir()
            (folder / "train.tar").write_bytes(data)
            with pytest.raises(DeitfastError):  # the images are cut short, so nothing is ever usable
                open_dataset(str(folder), split="train", quiet=True)


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("DEITFAST_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_folder("weights")) == "/a/weights"
    monkeypatch.setenv("DEITFAST_HOME", "")
    assert str(cache_folder("weights")) == "/b/deitfast/weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert str(cache_folder("weights")) == os.path.expanduser("~/.cache/deitfast/weights")
