"""No file is passed over, used twice or used in silence: what people's folders and shards hold."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deitfast.data import EvalLoader, TrainLoader, open_dataset
from deitfast.data.check import check_dataset
from deitfast.data.files import begins_as_image
from deitfast.data.scan import inspect_image
from deitfast.errors import DeitfastError
from deitfast.model.preprocessing import Preprocessing
from deitfast.recipe import Recipe
from deitfast.use.images import centre_crop, find_images, open_image


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path_factory.mktemp("home")))


def picture(seed: int = 0, size: tuple[int, int] = (20, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def classes(root: Path, names: tuple[str, ...] = ("ape", "bat"), splits: tuple[str, ...] = ("train", "val")) -> Path:
    for s, split in enumerate(splits):
        for k, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                picture(100 * s + 10 * k + i).save(root / split / name / f"{i}.jpg")
    return root


def names(root: Path) -> set[str]:
    train = open_dataset(str(root), split="train", quiet=True).train
    assert train is not None
    return {train.name(i) for i in range(len(train))}


def encoded(kind: str, image: Image.Image | None = None) -> bytes:
    buffer = io.BytesIO()
    (image or picture(5)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("name", ["b94d27", "photo.jfif", "photo.JPG_large", "scan.0001", "x.image"])
def test_an_image_is_known_by_its_content(name, kind, tmp_path):
    root = classes(tmp_path)
    (root / "train/ape" / name).write_bytes(encoded(kind))
    (root / "train/ape/notes.md").write_text("BM is how a bitmap begins")
    assert names(root) - {"ape/0.jpg", "ape/1.jpg", "bat/0.jpg", "bat/1.jpg"} == {f"ape/{name}"}
    assert str(root / "train/ape" / name) in find_images([str(root / "train")])


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_an_image_of_a_kind_that_cannot_be_used_is_named(kind, tmp_path):
    root = classes(tmp_path)
    (root / "train/ape/other").write_bytes(encoded(kind))
    (root / "train/ape/phone").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    train = open_dataset(str(root), split="train", quiet=True).train
    assert {name for name, _ in train.bad} == {"ape/other", "ape/phone"}
    assert not begins_as_image(b"BMW is a make of car")


HIDDEN = (
    "ape/.ipynb_checkpoints/0-checkpoint.jpg", "ape/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "ape/._0.jpg", "ape/0.jpg~",
    "__MACOSX/ape/._0.jpg", "ape/.thumbnails/x.png", "ape/Thumbs.db", "ape/desktop.ini", "lost+found/x.jpg",
    "$RECYCLE.BIN/x.jpg", "ape/.git/x.jpg", "@eaDir/x.jpg", "ape/.AppleDouble/0.jpg", ".Trash-1000/x.jpg",
)  # fmt: skip


@pytest.mark.parametrize("hidden", HIDDEN)
def test_copies_that_programs_leave_are_no_images(hidden, tmp_path):
    root = classes(tmp_path)
    before = names(root)
    path = root / "train" / hidden
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded("JPEG"))
    assert names(root) == before
    assert len(find_images([str(root / "train")])) == 4


@pytest.mark.parametrize("target", [".", "..", "../..", "sub"])
def test_a_link_that_loops_counts_each_image_once(target, tmp_path):
    root = classes(tmp_path)
    (root / "train/ape/sub").mkdir()
    picture(7).save(root / "train/ape/sub/x.jpg")
    os.symlink(target, root / "train/ape/here")
    found = [Path(name).resolve() for name in find_images([str(root / "train/ape")])]
    assert len(found) == len(set(found))
    if target in (".", "sub"):
        assert names(root) == {"ape/0.jpg", "ape/1.jpg", "ape/sub/x.jpg", "bat/0.jpg", "bat/1.jpg"} or target == "sub"
        assert len(names(root)) == 5


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    root = classes(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    picture(9).save(tmp_path / "elsewhere/x.jpg")
    os.symlink(tmp_path / "elsewhere", root / "train/ape/more")
    assert "ape/more/x.jpg" in names(root)


@pytest.mark.parametrize("name", ["Train", "training", "TRAIN"])
@pytest.mark.parametrize("val", ["valid", "Val", "validation", "test", "Valid"])
def test_splits_are_found_by_the_names_that_people_give_them(name, val, tmp_path):
    data = open_dataset(str(classes(tmp_path, splits=(name, val))), quiet=True)
    assert len(data.train) == 4
    assert len(data.val) == 4


@pytest.mark.parametrize("name", ["train-000.tar", "training-000.tar", "train_0.tar", "Train.tar", "train/a.tar"])
def test_shards_are_found_by_the_names_that_people_give_them(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write_tar(tmp_path / name, {"ape/0.jpg": encoded("JPEG"), "bat/0.jpg": encoded("JPEG")})
    assert len(open_dataset(str(tmp_path), split="train", quiet=True).train) == 2


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_keys_with_dots_keep_their_own_labels(tmp_path):
    files = {}
    for i, key in enumerate(("a.1", "a.2", "b", "c.v2", "d", "e/x.y.z")):
        files |= {f"{key}.jpg": encoded("JPEG", picture(i)), f"{key}.cls": str(i).encode()}
    files |= {"f.input.jpg": encoded("JPEG"), "f.cls": b"6", "g": encoded("PNG"), "g.cls": b"7"}
    write_tar(tmp_path / "train.tar", files)
    train = open_dataset(str(tmp_path), split="train", quiet=True).train
    labels = {train.name(i).split("/", 1)[1]: int(train.label[i]) for i in range(len(train))}
    assert labels == {
        "a.1.jpg": 0, "a.2.jpg": 1, "b.jpg": 2, "c.v2.jpg": 3, "d.jpg": 4, "e/x.y.z.jpg": 5, "f.input.jpg": 6, "g": 7,
    }  # fmt: skip


def test_hidden_members_of_shards_are_no_images(tmp_path):
    good = {"ape/0.jpg": encoded("JPEG"), "bat/0.jpg": encoded("JPEG"), "bat/noname": encoded("PNG")}
    hidden = {"__MACOSX/ape/._0.jpg": b"x", "ape/@eaDir/t.jpg": encoded("JPEG"), "ape/._0.jpg": b"x"}
    write_tar(tmp_path / "train.tar", good | hidden | {"ape/notes.txt": b"text"})
    train = open_dataset(str(tmp_path), split="train", quiet=True).train
    assert (len(train), len(train.bad)) == (3, 0)


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turns_in_exif_are_counted(kind, orientation, tmp_path):
    root = classes(tmp_path)
    image = picture(9)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(root / f"train/ape/phone.{kind.lower()}", exif=exif)
    report = check_dataset(open_dataset(str(root), quiet=True))
    expected = [] if orientation == 1 else [f"ape/phone.{kind.lower()}"]
    assert report.splits["train"].rotated == expected
    assert any("turned by EXIF" in line for line in report.lines()) == bool(expected)


def test_a_photo_of_64_million_pixels_is_not_damaged(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9248, 6944), (200, 30, 30)).save(buffer, "JPEG", quality=60)
    facts = inspect_image(buffer.getvalue(), whole=False)
    assert (facts.width, facts.height) == (9248, 6944)


PALETTES = {
    "transparency by colour": lambda: (picture().quantize(16), {"transparency": bytes(range(0, 256, 16))}),
    "transparency by index": lambda: (picture().quantize(16), {"transparency": 3}),
    "two colours": lambda: (picture().quantize(2), {}),
    "bits": lambda: (picture().convert("1"), {}),
    "grey": lambda: (picture().convert("L"), {}),
    "grey and alpha": lambda: (picture().convert("LA"), {}),
    "16 bits": lambda: (Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200), {}),
}


@pytest.mark.parametrize("kind", PALETTES)
def test_every_kind_of_png_gives_pils_pixels_without_a_remark(kind, tmp_path):
    root = classes(tmp_path)
    image, options = PALETTES[kind]()
    image.save(root / "train/ape/odd.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(root / "train/ape/odd.png") as opened:
            expected = np.asarray(opened.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train = open_dataset(str(root), split="train", quiet=True).train
        index = next(i for i in range(len(train)) if "odd" in train.name(i))
        np.testing.assert_array_equal(train.rgb(index), expected)
        np.testing.assert_array_equal(np.asarray(open_image(root / "train/ape/odd.png")), expected)


def test_one_level_too_deep_or_too_high_is_told(tmp_path):
    root = classes(tmp_path / "above")
    with pytest.raises(DeitfastError, match=f"train is one split of a set. Give the folder above it, {root}$"):
        open_dataset(str(root / "train"))
    with pytest.raises(DeitfastError, match=f"Give {root}, which has one"):
        open_dataset(str(tmp_path))


def test_one_class_and_a_class_without_validation_images_are_told(tmp_path, capsys):
    root = classes(tmp_path / "a")
    for path in (root / "val/bat").iterdir():
        path.unlink()
    (root / "val/bat").rmdir()
    data = open_dataset(str(root))
    assert "1 of 2 classes have no validation image: bat" in capsys.readouterr().err
    assert check_dataset(data).lines()[-1] == "1 of 2 classes have no validation image: bat"
    open_dataset(str(classes(tmp_path / "b", ("ape",))))
    assert "has one class only, ape: any answer will be right" in capsys.readouterr().err


def test_the_bound_of_pixels_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above Pillow's own bound, too: it is made small here, for the memory of the test."""
    root = classes(tmp_path / "d")
    large = root / "train/ape/large.png"
    picture(9, (50, 40)).save(large)
    monkeypatch.setattr("deitfast.data.manifest.MAX_PIXELS", 1_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses twice as many
    data = open_dataset(str(root), quiet=True)
    assert data.train is not None
    why = "more than 0.001 million pixels. Reduce it, or set DEITFAST_MAX_PIXELS"
    assert [(Path(name).name, what) for name, what in data.train.bad] == [("large.png", why)]
    with pytest.raises(DeitfastError, match=r"1,000 pixels\. Reduce it, or set DEITFAST_MAX_PIXELS"):
        open_image(large)
    monkeypatch.setenv("DEITFAST_MAX_PIXELS", "2e3")
    again = open_dataset(str(root), quiet=True)  # not the manifest of before
    assert again.train is not None
    assert not again.train.bad
    assert np.array_equal(np.asarray(open_image(large)), np.asarray(picture(9, (50, 40))))
    monkeypatch.setenv("DEITFAST_MAX_PIXELS", "many")
    with pytest.raises(DeitfastError, match="DEITFAST_MAX_PIXELS is 'many', must be a number of pixels"):
        open_dataset(str(root), quiet=True)


@pytest.mark.parametrize("size", [(1, 9_000), (9_000, 1), (3, 4_000)], ids=str)
def test_a_long_thin_image_loses_no_other(size: tuple[int, int], tmp_path: Path) -> None:
    root = classes(tmp_path / "d")
    for split in ("train", "val"):
        picture(5, size).save(root / split / "ape/thin.png")
    data = open_dataset(str(root), quiet=True)
    assert data.train is not None
    assert data.val is not None
    settings = Recipe(data=str(root), batch=4, repeats=1, mix_group=2, workers=1, rand_augment="none")
    with TrainLoader(data.train, settings, 32, 4, stop_step=5) as loader:
        seen = {int(i) for batch in loader for i in batch.index}
        assert seen == set(range(5))
        assert not loader.quarantined
    evaluation = EvalLoader(data.val, 32, 0.875, 4)
    assert sum(len(images) for images, _ in evaluation) == 5
    assert not evaluation.quarantined
    assert centre_crop(open_image(root / "val/ape/thin.png"), 32, Preprocessing(crop_ratio=0.875)).shape == (32, 32, 3)
