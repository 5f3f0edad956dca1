"""Finding, checking and indexing images: layouts, damaged files, the cache, and each error's one line."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from deitfast.data import imagenet_classes, open_dataset
from deitfast.data import scan as scan_module
from deitfast.errors import DeitfastError
from tests.data.conftest import picture


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def pack(folder: Path, to: Path, integer_labels: bool = False) -> None:
    """A shard of the class folders below `folder`: class folders inside, or .cls files with integers."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(to, "w") as tar:
        for label, sub in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
            for file in sorted(sub.iterdir()):
                if integer_labels:
                    add(tar, f"{sub.name}_{file.stem}.jpg", file.read_bytes())
                    add(tar, f"{sub.name}_{file.stem}.cls", str(label).encode())
                else:
                    add(tar, f"{sub.name}/{file.name}", file.read_bytes())


def samples(manifest) -> list[tuple[int, int, int, int]]:
    """What identifies each image, independent of where it lies."""
    rows = zip(manifest.label, manifest.width, manifest.height, manifest.checksum, strict=True)
    return [tuple(int(x) for x in row) for row in rows]


def test_folder_and_every_kind_of_shard_give_the_same_samples(make_folder, tmp_path):
    root = make_folder()
    data = open_dataset(str(root))
    assert data.classes == ("ape", "bat", "cow")
    assert (len(data.train), len(data.val)) == (18, 9)
    assert data.train.name(7) == "bat/001.jpg"
    assert data.train.read(7).tobytes() == (root / "train/bat/001.jpg").read_bytes()
    width, height = Image.open(root / "train/bat/001.jpg").size
    assert (data.train.width[7], data.train.height[7]) == (width, height)

    pack(root / "train", tmp_path / "a" / "train.tar")
    pack(root / "val", tmp_path / "a" / "validation.tar")
    pack(root / "train", tmp_path / "b" / "train-000.tar", integer_labels=True)
    pack(root / "val", tmp_path / "b" / "val" / "0.tar", integer_labels=True)
    (tmp_path / "b" / "classes.txt").write_text("ape\nbat\ncow\n")
    for name in ("a", "b"):
        packed = open_dataset(str(tmp_path / name))
        assert packed.classes == data.classes
        assert samples(packed.train) == samples(data.train)
        assert samples(packed.val) == samples(data.val)
        assert packed.train.read(7).tobytes() == data.train.read(7).tobytes()


def test_json_labels_and_numbered_classes(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for i in range(3):
            buffer = io.BytesIO()
            picture(20, 20, i).save(buffer, "PNG")
            add(tar, f"{i}.png", buffer.getvalue())
            add(tar, f"{i}.json", json.dumps({"label": 2 - i}).encode())
    data = open_dataset(str(tmp_path), split="train")
    assert data.classes == ("0", "1", "2")
    assert data.train.label.tolist() == [2, 1, 0]


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def test_damaged_files_are_named_and_left_out(make_folder, cache, capsys):
    root = make_folder(train=3, val=1)
    folder = root / "train" / "bat"
    whole = (folder / "000.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    Image.new("RGB", (8, 8)).save(folder / "moving.gif")
    (folder / "empty.jpeg").touch()
    (folder / "large.jpg").write_bytes(claiming(whole, 17_850, 10_000))
    (folder / "huge.jpg").write_bytes(claiming(whole, 20_000, 20_000))
    (folder / "notes.txt").write_text("not meant as an image")
    expected = {"truncated.jpg", "text.jpg", "moving.gif", "empty.jpeg", "large.jpg", "huge.jpg"}

    data = open_dataset(str(root))
    assert len(data.train) == 9
    assert {Path(name).name for name, _ in data.train.bad} == expected
    reasons = {Path(name).name: reason for name, reason in data.train.bad}
    too_many = "more than 178 million pixels. Reduce it, or set DEITFAST_MAX_PIXELS"
    assert reasons["large.jpg"] == f"17850 x 10000 pixels: {too_many}"
    assert reasons["huge.jpg"] == too_many
    assert reasons["empty.jpeg"] == "empty file"
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["text.jpg"] == reasons["moving.gif"] == "not a JPEG, PNG, BMP or WebP image"

    said = capsys.readouterr().err
    assert all(name in said for name in expected)
    assert f"6 of 15 images of {root / 'train'} unreadable" in said
    (listing,) = cache.glob("*.bad.txt")
    assert len(listing.read_text().splitlines()) == 6
    assert open_dataset(str(root), quiet=True).train.bad == data.train.bad  # from the cache
    assert capsys.readouterr().err == ""


def test_many_damaged_files_are_counted(make_folder, capsys):
    root = make_folder(train=1, val=1)
    for i in range(15):
        (root / "train" / "ape" / f"bad{i}.jpg").touch()
    open_dataset(str(root))
    assert capsys.readouterr().err.count("left out") == 10


def test_damage_inside_a_shard(make_folder, tmp_path):
    root = make_folder(train=2, val=1)
    (root / "train" / "cow" / "000.jpg").write_bytes(b"\xff\xd8 damaged")
    pack(root / "train", tmp_path / "packed" / "train.tar")
    data = open_dataset(str(tmp_path / "packed"))
    assert [name for name, _ in data.train.bad] == ["train.tar/cow/000.jpg"]
    assert len(data.train) == 5


def test_the_manifest_is_reused_until_something_changes(make_folder, cache, monkeypatch):
    root = make_folder()
    scans = []
    scan = scan_module.scan
    monkeypatch.setattr("deitfast.data.sources.scan", lambda *a, **k: scans.append(a[0].name) or scan(*a, **k))
    first = open_dataset(str(root))
    assert scans == ["train", "val"]
    again = open_dataset(str(root))
    assert scans == ["train", "val"]
    assert samples(again.train) == samples(first.train)
    assert [again.train.name(i) for i in range(18)] == [first.train.name(i) for i in range(18)]

    picture(33, 33, 9).save(root / "train" / "ape" / "new.jpg")
    assert len(open_dataset(str(root)).train) == 19
    assert scans == ["train", "val", "train"]
    os.utime(root / "val" / "ape" / "000.jpg", ns=(1, 1))
    open_dataset(str(root))
    assert scans == ["train", "val", "train", "val"]

    for file in cache.glob("*.npz"):  # what a full disk or a crash may leave
        file.write_bytes(file.read_bytes()[:100])
    assert len(open_dataset(str(root)).train) == 19
    assert len(scans) == 6


def test_a_cache_that_cannot_be_written_costs_only_time(make_folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(open_dataset(str(make_folder())).train) == 18
    assert "cannot keep the manifest" in capsys.readouterr().err


def test_imagenet_labels(make_folder):
    names = imagenet_classes()
    assert len(names) == 1000
    assert list(names) == sorted(names)
    root = make_folder(classes=("n01440764", "n02102040", "n03888257"))
    data = open_dataset(str(root), classes="imagenet")
    assert sorted(set(data.val.label.tolist())) == [0, 217, 701]
    assert len(data.classes) == 1000
    direct = open_dataset(str(root / "val"), split="val", classes="imagenet")
    assert direct.train is None
    assert samples(direct.val) == samples(data.val)
    with pytest.raises(DeitfastError, match=r"class 'ape' and 2 more of .* is none of the 1000 known"):
        open_dataset(str(make_folder("other")), split="val", classes="imagenet")


def test_val_is_labelled_by_trains_classes(make_folder, tmp_path):
    root = make_folder()
    for file in (root / "val" / "ape").iterdir():
        file.unlink()
    (root / "val" / "ape").rmdir()  # val may lack a class
    for split in (None, "val"):
        assert sorted(set(open_dataset(str(root), split=split).val.label.tolist())) == [1, 2]
    pack(root / "train", tmp_path / "packed" / "train.tar")
    pack(root / "val", tmp_path / "packed" / "val.tar")
    assert sorted(set(open_dataset(str(tmp_path / "packed"), split="val").val.label.tolist())) == [1, 2]


def error(data: object, **options: object) -> str:
    with pytest.raises(DeitfastError) as caught:
        open_dataset(str(data), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_name_the_thing_and_the_remedy(make_folder, tmp_path):
    root = make_folder("pictures")
    assert "pictres not found. Did you mean pictures?" in error(tmp_path / "pictres")
    assert "data folder digit not found. Did you mean digits?" in error("digit")
    assert "is a file. Give the folder" in error(root / "train" / "ape" / "000.jpg")
    assert "split 'dev' unknown" in error(root, split="dev")
    assert "classes 'cifar' unknown" in error(root, classes="cifar")

    (root / "train" / "dog").mkdir()
    assert f"class folder {root / 'train' / 'dog'} has no images. Fill it or remove it" == error(root)
    picture(20, 20, 0).save(root / "val" / "ape" / "x.png")
    (root / "train" / "dog").rmdir()
    (root / "val" / "bee").mkdir()
    picture(20, 20, 0).save(root / "val" / "bee" / "x.png")
    assert "class 'bee' of" in error(root)

    hollow = tmp_path / "hollow"
    (hollow / "train").mkdir(parents=True)
    (hollow / "train" / "train.tar.gz").touch()
    assert f"no class folders in {hollow / 'train'}; found train.tar.gz. Unpack train.tar.gz" in error(hollow)
    (hollow / "train" / "ape").mkdir()
    assert "no images in the 1 class folders of" in error(hollow)
    (tmp_path / "nothing").mkdir()
    assert "no train split in" in error(tmp_path / "nothing")
    assert "no val split in" in error(tmp_path / "nothing", split="val")
    assert "none of the 1 images of" in unreadable(tmp_path / "unreadable")


def unreadable(root: Path) -> str:
    (root / "train" / "ape").mkdir(parents=True)
    (root / "train" / "ape" / "x.jpg").touch()
    return error(root)


def test_errors_of_shards(make_folder, tmp_path):
    jpeg = (make_folder() / "train" / "ape" / "000.jpg").read_bytes()

    def shard(name: str, members: dict[str, bytes], mode: str = "w") -> Path:
        root = tmp_path / name
        root.mkdir()
        with tarfile.open(root / "train.tar", mode) as tar:
            for member, data in members.items():
                add(tar, member, data)
        return root

    assert "x.jpg in" in error(root := shard("bare", {"x.jpg": jpeg}))
    assert f"{root / 'train.tar'} has no label" in error(root)
    assert "x.cls in" in error(shard("words", {"x.jpg": jpeg, "x.cls": b"ape"}))
    assert "no images in" in error(shard("empty", {"x.cls": b"0"}))
    assert "is not a whole, uncompressed tar file" in error(shard("packed", {"a/x.jpg": jpeg}, mode="w:gz"))
    assert "label 5 of x.jpg" in error(shard("few", {"x.jpg": jpeg, "x.cls": b"5"}), classes=("a", "b"))
    assert "Label all of them or none" in error(shard("half", {"a/x.jpg": jpeg, "a/y.jpg": jpeg, "a/y.cls": b"0"}))


def test_the_packaged_digits_are_scikit_learns():
    data, digits = open_dataset("digits"), load_digits()
    assert (len(data.train), len(data.val)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    for split in (data.train, data.val):
        for i in range(0, len(split), 7):
            number = int(Path(split.name(i)).stem)
            assert split.label[i] == digits.target[number]
            assert (number % 5 == 0) == (split is data.val)
            pixels = np.asarray(Image.open(io.BytesIO(split.read(i).tobytes())), np.float64)
            blocks = pixels.reshape(8, 2, 8, 2).mean((1, 3)) * 16 / 255
            assert np.abs(blocks - digits.images[number]).max() < 0.6  # JPEG's error, in grey levels of 0..16
