"""`deitfast data prepare`, `check` and `show`, through their command line."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitfast.cli.main import _dispatch
from deitfast.data import TrainLoader, open_dataset
from deitfast.data import sources as sources_module
from deitfast.data.augmentation import Augmentation
from deitfast.data.prepared_shards import Settings, prepare_shards
from deitfast.data.show import _sheet, contact_sheet
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from tests.data.conftest import picture
from tests.data.test_bad_files import odd
from tests.data.test_sources import claiming, samples


def command(*arguments: object) -> None:
    """Run `deitfast data ...`."""
    _dispatch(["data", *map(str, arguments)])


def refused(*arguments: object) -> str:
    with pytest.raises(DeitfastError) as caught:
        command(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# prepare -------------------------------------------------------------------------------------------------------------


def test_prepared_shards_hold_the_same_samples_and_need_no_scan(make_folder, tmp_path, monkeypatch, capsys):
    root = make_folder()
    odd(root / "train" / "bat")
    (root / "train" / "cow" / "bad.jpg").write_text("no image")
    data = open_dataset(str(root))
    out = tmp_path / "out"
    command("prepare", root, out, "--per-shard", 7, "--workers", 1)
    assert "34 images in 6 shards" in (said := capsys.readouterr().out), said
    assert not [p for p in out.iterdir() if p.name.startswith(".")]

    # Any reader of WebDataset's layout: each image beside its label, and nothing else.
    with tarfile.open(out / "train-00001.tar") as tar:
        names = tar.getnames()
    assert [Path(n).suffix for n in names[1::2]] == [".cls"] * 7
    assert [Path(n).stem for n in names[::2]] == [Path(n).stem for n in names[1::2]]

    monkeypatch.setattr(sources_module, "scan", lambda *_: 1 / 0)
    for place in (out, tmp_path / "moved"):
        if place != out:
            shutil.copytree(out, place)  # with new times
        packed = open_dataset(str(place))
        assert packed.classes == data.classes
        for a, b in ((packed.train, data.train), (packed.val, data.val)):
            assert samples(a) == samples(b)
            assert all(a.read(i).tobytes() == b.read(i).tobytes() for i in range(len(b)))
            assert np.array_equal(a.convert, b.convert)
    known = open_dataset(str(out), "val", classes=("zoo", "cow", "bat", "ape")).val
    assert [known.classes[i] for i in known.label] == [data.classes[i] for i in data.val.label]
    with pytest.raises(DeitfastError, match=r"class 'ape' and 1 more of .* is none of the 2 known"):
        open_dataset(str(out), "val", classes=("cow", "dog"))

    # Without the manifest, or with one that does not fit, the shards are scanned as any other.
    monkeypatch.undo()
    (out / "train.manifest.npz").unlink()
    os.truncate(out / "val.manifest.npz", 1000)
    scanned = open_dataset(str(out))
    assert samples(scanned.train) == samples(data.train)
    assert samples(scanned.val) == samples(data.val)


def test_prepare_goes_on_where_it_stopped_and_redoes_nothing(make_folder, tmp_path, monkeypatch):
    from deitfast.data import prepared_shards as module

    data = open_dataset(str(make_folder()))
    out, settings = tmp_path / "out", Settings(per_shard=4)
    made: list[str] = []
    make = module._make_shard

    def counted(path: Path, *rest) -> None:
        if len(made) == 3:
            raise OSError(28, "No space left on device", str(path))
        make(path, *rest)
        made.append(path.name)

    monkeypatch.setattr(module, "_make_shard", counted)
    with pytest.raises(DeitfastError, match=r"cannot write .*train-00003.tar: No space left on device. What is finish"):
        prepare_shards(data, out, settings, workers=1)
    first = list(made)
    made.clear()
    with pytest.raises(DeitfastError):  # three more, then the disk is full again
        prepare_shards(data, out, settings, workers=1)
    monkeypatch.setattr(module, "_make_shard", make)
    done = prepare_shards(data, out, settings, workers=1)
    assert first == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    assert made == ["train-00003.tar", "train-00004.tar", "val-00000.tar"]
    assert (done.made, done.found, done.images) == (2, 6, 27)
    again = prepare_shards(data, out, settings, workers=1)
    assert (again.made, again.found) == (0, 8)

    # A shard that reads back wrong is removed, and only it is made again.
    shard = out / "train-00001.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[1000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DeitfastError, match=r"train-00001.tar/.* read back wrong"):
        prepare_shards(data, out, settings, workers=1)
    mended = prepare_shards(data, out, settings, workers=1)
    assert mended.images == 27
    assert samples(open_dataset(str(out)).train) == samples(data.train)


def test_prepare_reduces_the_short_side(make_folder, tmp_path):
    root = make_folder()
    data = open_dataset(str(root)).train
    command("prepare", root, tmp_path / "out", "--short-side", 48, "--quality", 90, "--workers", 1)
    small = open_dataset(str(tmp_path / "out")).train
    for i in range(len(data)):
        width, height = int(data.width[i]), int(data.height[i])
        short = min(width, height)
        if short <= 48:
            assert small.read(i).tobytes() == data.read(i).tobytes()
            continue
        size = (round(width * 48 / short), round(height * 48 / short))
        assert (int(small.width[i]), int(small.height[i])) == size
        theirs = Image.fromarray(data.rgb(i)).resize(size, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        theirs.save(buffer, "JPEG", quality=90)
        assert small.read(i).tobytes() == buffer.getvalue()


@pytest.mark.slow
def test_prepare_with_several_processes_writes_the_same_bytes(make_folder, tmp_path):
    root = make_folder(train=3, val=1)
    for name, workers in (("a", 1), ("b", 2)):
        command("prepare", root, tmp_path / name, "--per-shard", 4, "--workers", workers)
    for file in (tmp_path / "a").glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_prepare_refuses_what_it_cannot_do(make_folder, tmp_path):
    root = make_folder(train=2, val=1)
    assert refused("prepare", root, tmp_path / "x", "--per-shard", 0) == "--per-shard is 0, must be in [1, 1000000]"
    assert refused("prepare", root, "x", "--qualty=3") == "unknown flag --qualty. Did you mean --quality?"
    assert f"{root} is not empty" in refused("prepare", root, root)
    command("prepare", root, tmp_path / "out", "--workers", 1)
    assert "with other settings. Give another folder" in refused("prepare", root, tmp_path / "out", "--quality", 80)


# check ---------------------------------------------------------------------------------------------------------------


def test_check_reports_every_finding(make_folder, capsys):
    root = make_folder(train=3, val=2)
    command("check", root)
    assert "train: 9 images, 0 damaged" in capsys.readouterr().out
    train, val = root / "train", root / "val"
    whole = (train / "ape" / "000.jpg").read_bytes()
    (train / "ape" / "cut.jpg").write_bytes(whole[:200])
    (train / "ape" / "bomb.jpg").write_bytes(claiming(whole, 20_000, 20_000))
    picture(8, 60, 1).save(train / "bat" / "thin.png")
    Image.new("RGB", (700, 500)).save(train / "bat" / "large.png")
    picture(50, 50, 2).save(train / "bat" / "really.jpg", "PNG")
    (train / "ape" / "twin.jpg").write_bytes((train / "ape" / "001.jpg").read_bytes())
    (train / "cow" / "stray.jpg").write_bytes((train / "bat" / "001.jpg").read_bytes())
    (val / "ape" / "seen.jpg").write_bytes((train / "ape" / "002.jpg").read_bytes())

    with pytest.raises(SystemExit) as ended:
        command("check", root, "--json", "--huge", 0.3)
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    found = report["train"]
    assert (report["damaged"], found["images"]) == (2, 16)
    assert {name for name, _ in found["damaged"]} == {"ape/cut.jpg", "ape/bomb.jpg"}
    assert found["tiny"] == [["bat/thin.png", 8, 60]]
    assert found["huge"] == [["bat/large.png", 700, 500]]
    assert found["wrong_suffix"] == [["bat/really.jpg", "PNG"]]
    assert sorted(found["duplicates"]) == [["ape/001.jpg", "ape/twin.jpg"], ["bat/001.jpg", "cow/stray.jpg"]]
    assert found["conflicts"] == [["bat/001.jpg", "cow/stray.jpg"]]
    assert report["leaks"] == [["ape/002.jpg", "ape/seen.jpg"]]
    with pytest.raises(SystemExit):
        command("check", root)
    said = capsys.readouterr().out
    for part in ("damaged: ape/cut.jpg", "tiny: bat/thin.png: 8 x 60", "really.jpg is a PNG", "leak: ape/002.jpg"):
        assert part in said


def test_check_finds_damage_that_left_time_and_size_alone(make_folder, capsys):
    root = make_folder(train=2, val=1)
    command("check", root)
    file = root / "train" / "cow" / "001.jpg"
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command("check", root)
    assert "damaged: cow/001.jpg: cow/001.jpg in" in capsys.readouterr().out


# show ----------------------------------------------------------------------------------------------------------------


def test_the_sheet_holds_what_the_loader_yields_and_says_what_was_done(make_folder, monkeypatch):
    manifest = open_dataset(str(make_folder())).train
    recipe = Recipe(data="x", batch=12, mix_group=12, workers=1)
    seen: list = []
    monkeypatch.setattr("deitfast.data.show._sheet", lambda *given: seen.append(given) or _sheet(*given))
    sheet = contact_sheet(manifest, recipe, 40, epoch=3, count=10)
    views, captions, _ = seen[0]
    with TrainLoader(manifest, recipe, 40, 12, start_step=3, stop_step=4) as loader:
        (batch,) = loader
    assert batch.epoch == 3
    assert np.array_equal(views, batch.images[:10].numpy())
    policy = Augmentation(recipe, 40, torch.device("cpu"))
    operations = policy.draw(batch.index.numpy(), 3, batch.view.numpy()).captions()
    for s, lines in enumerate(captions):
        i = int(batch.index[s])
        name = manifest.name(i).split("/")[1]
        assert lines == [name, f"view {batch.view[s]} of class {manifest.classes[manifest.label[i]]}", operations[s]]
    pixels = np.asarray(sheet)
    assert np.array_equal(pixels[8:48, 8:48], views[0])
    assert (pixels[48:60, 8:150] < 128).any()  # a caption

    contact_sheet(manifest, recipe, 40, epoch=3, count=10, mixed=True)
    mixed, captions, _ = seen[1]
    assert not np.array_equal(mixed, views)
    assert all(lines[3].startswith(("cutmix, own weight 0.", "mixup, own weight 0.")) for lines in captions)


def test_show_takes_recipes_and_flags(make_folder, tmp_path, capsys):
    root = make_folder()
    (tmp_path / "mine.py").write_text(
        "from deitfast.recipe import Recipe\nRECIPE = Recipe(model='deit_tiny_patch16_224', batch=6, image_size=24)\n"
    )
    sheet = tmp_path / "sheet.png"
    command("show", "--recipe", tmp_path / "mine.py", "--data", root, "--epoch", 2, "--count", 4, "--out", sheet)
    assert "4 views of epoch 2" in capsys.readouterr().out
    assert Image.open(sheet).size[0] > 4 * 150
    command("show", "--recipe", "deit3_small", "--data", root, "--image-size", 32, "--count", 2, "--out", sheet)
    assert "batch 2048 is more than the 18 training images" in capsys.readouterr().out
    command("show", "--data", root, "--image-size", 24, "--count", 3, "--rand-augment", "none", "--out", sheet)
    assert "batch 1024 is more than the 18 training images; shown is batch 18" in capsys.readouterr().out
    assert "--epoch is 300, must be in [0, 299]" in refused("show", "--data", root, "--epoch", 300, "--out", sheet)
    assert "--count is 0" in refused("show", "--data", root, "--count", 0, "--out", sheet)
    assert "no recipe " in refused("show", "--data", root, "--recipe", tmp_path / "yours.py")
    assert "defines no RECIPE" in refused("show", "--data", root, "--recipe", Path(__file__).parent / "conftest.py")
    assert "Did you mean --rand-augment?" in refused("show", "--data", root, "--rand-augmnt", "none")
    assert "Change --out" in refused("show", "--data", root, "--image-size", 24, "--count", 2, "--out", root)
