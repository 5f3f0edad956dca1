"""Bad files never stop a run: left out by the scan, replaced in the run, named, and nothing else changes."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deitfast.data import EvalLoader, Manifest, TooManyBadFiles, TrainLoader, dali, open_dataset
from deitfast.data.manifest import checksum
from deitfast.data.quarantine import Quarantine
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from tests.data.conftest import picture
from tests.data.test_loaders import assert_same, rows
from tests.data.test_sources import claiming, pack

SIZE = 32


def recipe(**changes) -> Recipe:
    settings = {"data": "bad", "batch": 12, "mix_group": 12, "workers": 2, "bad_limit": 1.0, "rand_augment": "none"}
    return Recipe(**(settings | changes))


def run(manifest: Manifest, settings: Recipe, micro: int = 12, world: int = 1, **span) -> tuple[dict, list[list[str]]]:
    """What each slot gets, keyed by (step, slot), and the names that each process quarantined, sorted."""
    seen: dict = {}
    quarantined = []
    for rank in range(world):
        with TrainLoader(manifest, settings, SIZE, micro, rank, world, say=lambda _: None, **span) as loader:
            for batch in loader:
                seen |= rows(batch, settings)
            quarantined.append(sorted(name for name, _ in loader.quarantined))
    return seen, quarantined


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which PIL cannot write: uint16 (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def damage(folder: Path, whole: bytes) -> set[str]:
    """Put every kind of file that cannot be used into a class folder; their names."""
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    Image.new("RGB", (8, 8)).save(folder / "moving.gif")
    (folder / "huge.jpg").write_bytes(claiming(whole, 20_000, 20_000))
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    return {"truncated.jpg", "empty.jpg", "text.jpg", "moving.gif", "huge.jpg", "gone.jpg"}


def odd(folder: Path) -> set[str]:
    """Put every odd kind of file that PIL decodes into a class folder; their names."""
    rng = np.random.default_rng(0)
    picture(50, 41, 1).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture(50, 42, 2).convert("L").save(folder / "gray.jpg", quality=95)
    Image.new("RGB", (1, 1), (200, 10, 90)).save(folder / "pixel.jpg")
    gray = np.asarray(picture(50, 43, 3).convert("L")).astype(np.uint16)
    Image.fromarray(gray * 257).save(folder / "gray16.png")
    colour = np.asarray(picture(50, 44, 4)).astype(np.uint16) * 256 + rng.integers(0, 256, (44, 50, 3), np.uint16)
    (folder / "colour16.png").write_bytes(png16(colour))
    alpha = picture(50, 45, 5)
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (45, 50), np.uint8)))
    alpha.save(folder / "alpha.png")
    picture(50, 46, 6).quantize(16).save(folder / "palette.png")
    return {"cmyk.jpg", "gray.jpg", "pixel.jpg", "gray16.png", "colour16.png", "alpha.png", "palette.png"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_every_kind_of_bad_file_trains_to_the_end(make_folder, tmp_path, packed, capsys):
    root = make_folder(train=8, val=1)
    clean = open_dataset(str(root)).train
    whole = (root / "train" / "ape" / "000.jpg").read_bytes()
    names = damage(root / "train" / "bat", whole)
    if packed:
        (root / "train" / "bat" / "gone.jpg").unlink()
        names.discard("gone.jpg")
        pack(root / "train", tmp_path / "packed" / "train.tar")
        root = tmp_path / "packed"
    manifest = open_dataset(str(root), split="train").train
    said = capsys.readouterr().err
    assert {Path(name).name for name, _ in manifest.bad} == names
    assert all(name in said for name in names)
    assert [manifest.label.tolist(), manifest.checksum.tolist()] == [clean.label.tolist(), clean.checksum.tolist()]
    settings = recipe(repeats=3)
    seen, quarantined = run(manifest, settings, stop_step=4)
    assert_same(seen, run(clean, settings, stop_step=4)[0])
    assert quarantined == [[]]


def test_odd_files_decode_as_pil_does(make_folder):
    root = make_folder(train=1, val=1)
    names = odd(root / "train" / "bat")
    manifest = open_dataset(str(root)).train
    kinds = {Path(manifest.name(i)).name: bool(manifest.convert[i]) for i in range(len(manifest))}
    assert names <= kinds.keys()
    assert {name for name, convert in kinds.items() if convert} == {"gray16.png", "colour16.png"}
    settings = recipe(batch=len(manifest), crop_min=1.0, flip=0.0, mixup=0.0, cutmix=0.0, repeats=1)
    seen, _ = run(manifest, settings, len(manifest), stop_step=1)
    assert len(seen) == len(manifest)
    for sample in seen.values():
        image = Image.fromarray(manifest.rgb(int(sample["index"])))
        # With crop_min 1 the crop is the largest central one, so PIL can follow from the size alone.
        width, height = image.size
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        box = ((width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h)
        theirs = np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(theirs - sample["images"])
        if box == (0, 0, width, height):
            assert difference.max() <= 3, manifest.name(int(sample["index"]))
    for images, labels in EvalLoader(manifest, SIZE, workers=1):
        assert len(images) == len(labels) == len(manifest)


def vanish(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(1000))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def claim_to_be_huge(path: Path) -> None:
    path.write_bytes(claiming(path.read_bytes(), 20_000, 20_000))


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM: list[Callable[[Path], None]] = [vanish, truncate, grow, flip_a_bit, claim_to_be_huge, become_a_folder]


@pytest.fixture
def harmed(make_folder, cache) -> tuple[Manifest, Manifest, set[int]]:
    """A manifest, of which some files were harmed after the scan; the same in an unharmed folder; the harmed images."""
    manifest = open_dataset(str(make_folder(train=16, val=1))).train
    whole = open_dataset(str(make_folder("whole", train=16, val=1))).train
    bad = set(range(3, 45, 7))
    for harm, i in zip(HARM, sorted(bad), strict=True):
        harm(Path(manifest.root) / manifest.name(i))
    return manifest, whole, bad


@pytest.mark.parametrize("repeats", [1, 3])
def test_files_harmed_in_the_run_are_replaced_and_nothing_else_changes(harmed, repeats):
    manifest, whole, bad = harmed
    settings = recipe(repeats=repeats)
    steps = 4 if repeats == 1 else 12  # one epoch shows every image, or a third of them
    seen, (names,) = run(manifest, settings, stop_step=steps)
    unharmed, _ = run(whole, settings, stop_step=steps)
    assert seen.keys() == unharmed.keys()
    replaced = {key for key in seen if int(unharmed[key]["index"]) in bad}
    met = {int(unharmed[key]["index"]) for key in replaced}
    assert met == bad or (repeats > 1 and len(met) >= 4)
    assert {manifest.name(i) for i in met} <= set(names) <= {manifest.name(i) for i in bad}
    for key, sample in seen.items():
        assert int(sample["labels"]) == manifest.label[int(sample["index"])]
        if key in replaced:
            assert int(sample["index"]) not in bad
            assert key[1] ^ 1 in {slot for step, slot in seen if step == key[0]}
        else:
            own = ("images", "labels", "index", "view", "erase", "lam", "mix_box")  # `input` mixes in the partner
            assert all(np.array_equal(sample[name], unharmed[key][name]) for name in own)


def test_every_process_and_every_resumed_run_replaces_alike(harmed):
    manifest, _, _ = harmed
    settings = recipe(repeats=3)
    seen, _ = run(manifest, settings, stop_step=6)
    for micro, world in ((6, 1), (6, 2), (2, 2), (2, 3)):
        again, quarantined = run(manifest, settings, micro, world, stop_step=6)
        assert_same(again, seen)
        assert len(quarantined) == world
    for start in range(1, 6):
        resumed, _ = run(manifest, settings, start_step=start, stop_step=6)
        assert_same(resumed, {key: value for key, value in seen.items() if key[0] >= start})


def test_names_are_told_once_and_listed(harmed, tmp_path):
    manifest, _, bad = harmed
    said: list[str] = []
    listing = tmp_path / "run" / "bad.txt"
    with TrainLoader(manifest, recipe(repeats=1), SIZE, 12, stop_step=8, say=said.append, bad_list=listing) as loader:
        for _ in loader:
            pass
        assert len(loader.quarantined) == len(bad)
    names = {manifest.name(i) for i in bad}
    assert len(said) == len(bad)
    assert all(sum(name in line for line in said) == 1 and "\n" not in "".join(said) for name in names)
    assert {line.split("\t")[0] for line in listing.read_text().splitlines()} == names


def test_over_the_limit_the_run_stops_with_the_list(harmed, cache):
    manifest, _, bad = harmed
    settings = recipe(repeats=1, bad_limit=3 / len(manifest))
    with TrainLoader(manifest, settings, SIZE, 12, say=lambda _: None) as loader, pytest.raises(TooManyBadFiles) as e:
        list(loader)
    (listing,) = (cache.parent / "unreadable").iterdir()
    assert f"of 48 images of {manifest.root} became unreadable in the run, listed in {listing}" in str(e.value)
    assert "raise --bad-limit" in str(e.value)
    assert "\n" not in str(e.value)
    assert isinstance(e.value, DeitfastError)
    assert 3 < len(listing.read_text().splitlines()) <= len(bad)


def test_a_shard_that_breaks_in_the_run_kills_nothing(make_folder, tmp_path):
    root = make_folder(train=16, val=1)
    for shard, classes in (("train-0.tar", ("ape", "bat")), ("train-1.tar", ("cow",))):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in classes:
                tar.add(root / "train" / name, name)
    manifest = open_dataset(str(tmp_path), split="train").train
    settings = recipe(repeats=1)
    with TrainLoader(manifest, settings, SIZE, 12, stop_step=10, say=lambda _: None) as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(tmp_path / "train-1.tar", 20_000)  # under a memory map this would be a SIGBUS
        rest = list(batches)
    assert len(rest) == 9
    quarantined = {name for name, _ in loader.quarantined}
    assert quarantined
    assert all(name.startswith("train-1.tar/cow") for name in quarantined)


def test_when_all_data_is_gone_the_error_says_so(make_folder):
    root = make_folder(train=4, val=1)
    manifest = open_dataset(str(root)).train
    os.rename(root, root.with_name("moved"))
    with (
        TrainLoader(manifest, recipe(repeats=1), SIZE, 12, say=lambda _: None) as loader,
        pytest.raises(TooManyBadFiles, match=r"images in a row of .* are unreadable.* Is the data still there"),
    ):
        list(loader)
    with pytest.raises(TooManyBadFiles):
        list(EvalLoader(manifest, SIZE, say=lambda _: None))


def test_evaluation_leaves_a_harmed_image_out_and_says_so(harmed):
    manifest, whole, bad = harmed
    said: list[str] = []
    loader = EvalLoader(manifest, SIZE, batch=7, workers=1, say=said.append, bad_limit=1.0)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    kept = [i for i in range(len(manifest)) if i not in bad]
    expected = torch.cat([batch for batch, _ in EvalLoader(whole, SIZE, batch=48, workers=1)])
    assert torch.equal(images, expected[kept])
    assert labels.tolist() == manifest.label[kept].tolist()
    assert len(said) == len(loader.quarantined) == len(bad)


def test_what_only_dali_cannot_decode_is_decoded_by_pil_and_no_batch_is_lost(make_folder, monkeypatch):
    root = make_folder(train=16, val=1)
    manifest = open_dataset(str(root)).train
    settings = recipe(repeats=1)
    expected, _ = run(manifest, settings, stop_step=4)
    # DALI is handed rubbish for two whole files, as if it had a fault that PIL does not have.
    read = Manifest.read
    victims = {int(manifest.checksum[i]) for i in (5, 30)}

    def rubbish(self: Manifest, i: int, for_pil: bool = False) -> np.ndarray:
        data = read(self, i)
        return np.zeros(500, np.uint8) if int(self.checksum[i]) in victims and not for_pil else data

    built: list[int] = []
    build = dali.Runner._build

    def counted(self, source, batch, **options):
        built.append(batch)
        return build(self, source, batch, **options)

    monkeypatch.setattr(dali.Runner, "_build", counted)
    monkeypatch.setattr(Manifest, "read", rubbish)
    monkeypatch.setattr(
        Manifest, "rgb", lambda self, i: np.asarray(Image.open(io.BytesIO(rubbish(self, i, True).data)).convert("RGB"))
    )
    seen, (quarantined,) = run(manifest, settings, stop_step=4)
    assert quarantined == []
    assert_same(seen, expected)
    assert built.count(1) <= 2 * (len(victims) + 1)  # not one for each image in flight

    # And what PIL cannot decode either is quarantined, under its name.
    def fail(self: Manifest, i: int) -> np.ndarray:
        raise DeitfastError("broken")

    monkeypatch.setattr(Manifest, "rgb", fail)
    seen, (quarantined,) = run(manifest, settings, stop_step=4)
    assert quarantined == sorted(manifest.name(i) for i in (5, 30))
    assert seen.keys() == expected.keys()


@pytest.mark.parametrize(
    ("says", "told"),
    [
        ("CUDA allocation failed: Can't allocate 213909504 bytes on device 0.", "no memory left to decode images"),
        ("std::bad_alloc", "no memory left to decode images"),
        ("CUDA runtime API error cudaErrorIllegalAddress (700)", "the GPU failed while images were decoded"),
    ],
)
def test_what_is_no_images_fault_is_told_as_what_it_is(make_folder, monkeypatch, says, told):
    manifest = open_dataset(str(make_folder(train=16, val=1))).train

    def fail(self):
        raise RuntimeError(f"Critical error in pipeline: {says}")

    monkeypatch.setattr(dali.Runner, "_run", fail)
    monkeypatch.setattr(dali.Runner, "_mend", lambda self: pytest.fail("an image was suspected"))
    with pytest.raises(DeitfastError, match=rf"^{told}.* DALI says: Critical error"):
        run(manifest, recipe(repeats=1), stop_step=1)


@pytest.mark.slow
def test_a_run_over_bad_files_ends_with_its_scores_and_their_names(make_folder, tmp_path, monkeypatch, capsys):
    import deitfast.training.train

    root = make_folder(train=10, val=3)
    whole = (root / "train" / "ape" / "000.jpg").read_bytes()
    damaged = damage(root / "train" / "bat", whole)
    odd(root / "train" / "cow")

    class Harmed(TrainLoader):
        """Between the scan and the first step two files are harmed."""

        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            vanish(root / "train" / "ape" / "003.jpg")
            truncate(root / "train" / "bat" / "004.jpg")

    monkeypatch.setattr(deitfast.training.run, "TrainLoader", Harmed)
    run_folder = tmp_path / "run"
    result = deitfast.training.train.train(
        recipe(
            model="deit_tiny_patch16_224", data=str(root), image_size=32, micro_batch=6, repeats=1, epochs=2,
            warmup_epochs=1.0, device="cpu", eval_every=2, out=str(run_folder), rand_augment="rand-m9-mstd0.5-inc1",
        )
    )  # fmt: skip
    assert result.raw.images == 9
    assert np.isfinite(result.raw.loss)
    said = capsys.readouterr().err
    assert all(name in said for name in damaged)
    log = (run_folder / "log.txt").read_text()
    assert log.count("ape/003.jpg") == log.count("bat/004.jpg") == 1


def test_replacements_are_spread_evenly(make_folder):
    manifest = open_dataset(str(make_folder(train=4, val=1))).train
    chains = Quarantine(manifest, 3, 1, print)
    links = np.array([[chains._link(i, attempt) for attempt in range(100)] for i in range(12)])
    counts = np.bincount(links.ravel(), minlength=12)
    assert ((counts - 100) ** 2 / 100).sum() < 31.3  # chi-square, 11 degrees of freedom, p = .001
    assert links.tolist() != [[Quarantine(manifest, 4, 1, print)._link(i, a) for a in range(100)] for i in range(12)]


def test_a_file_that_changes_in_the_manifest_is_never_read_as_another(make_folder):
    manifest = open_dataset(str(make_folder(train=4, val=1))).train
    assert all(checksum(manifest.read(i)) == int(manifest.checksum[i]) for i in range(len(manifest)))
    swapped = replace(manifest, checksum=manifest.checksum[::-1].copy())
    with pytest.raises(DeitfastError, match="holds other bytes than when it was scanned"):
        swapped.read(0)
