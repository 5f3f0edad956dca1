"""What the loaders yield: independent of processes and micro-batches, exact at resume, and PIL's pixels."""

from __future__ import annotations

import gc
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deitfast.data import EvalLoader, Manifest, Order, TrainLoader, dali, decoder, draws, open_dataset, prepare
from deitfast.data.augmentation import Augmentation
from deitfast.data.batch import Batch
from deitfast.data.eval_loader import eval_geometry
from deitfast.data.manifest import PER_IMAGE
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from tests.data.conftest import picture
from tests.reference import import_torchvision

SIZE = 32
PAPER = "rand-m9-mstd0.5-inc1"


def recipe(**changes) -> Recipe:
    return Recipe(**({"data": "digits", "batch": 32, "mix_group": 16, "workers": 2, "rand_augment": "none"} | changes))


@pytest.fixture(scope="module")
def digits() -> Manifest:
    return open_dataset("digits").train


def run(manifest: Manifest, settings: Recipe, micro: int, world: int = 1, **span: int) -> dict[tuple, dict]:
    """Everything each slot gets, from all processes in turn, keyed by (step, slot)."""
    seen = {}
    for rank in range(world):
        with TrainLoader(manifest, settings, SIZE, micro, rank, world, **span) as loader:
            for batch in loader:
                for key, value in rows(batch, settings).items():
                    assert key not in seen
                    seen[key] = value
    return seen


def rows(batch: Batch, settings: Recipe) -> dict[tuple, dict]:
    tensors = {name: getattr(batch, name) for name in ("images", "labels", "index", "view", "erase", "lam", "mix_box")}
    tensors["input"], targets = prepare(batch, settings)
    tensors["partner"] = targets.partner_labels
    return {
        (batch.step, int(slot)): {name: t[i].numpy() for name, t in tensors.items()} | {"epoch": int(batch.epoch)}
        for i, slot in enumerate(batch.slots)
    }


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        for name in a[key]:
            assert np.array_equal(a[key][name], b[key][name]), (key, name)


@pytest.mark.parametrize(("repeats", "policy"), [(1, "none"), (3, PAPER), (3, "three")])
def test_processes_and_micro_batches_do_not_matter(digits, repeats, policy):
    settings = recipe(repeats=repeats, rand_augment=policy, color_jitter=0.3)
    whole = run(digits, settings, micro=32, stop_step=2)
    assert len(whole) == 64
    plan = Order(len(digits), 32, repeats, settings.seed, 16)
    for step in range(2):
        index, view, _ = plan.slots(step)
        assert [int(whole[step, s]["index"]) for s in range(32)] == index.tolist()
        assert [int(whole[step, s]["view"]) for s in range(32)] == view.tolist()
        assert [int(whole[step, s]["labels"]) for s in range(32)] == digits.label[index].tolist()
    for micro, world in ((2, 1), (8, 2), (8, 4)):
        assert_same(run(digits, settings, micro, world, stop_step=2), whole)


def test_a_rare_classs_image_comes_again_in_views_of_its_own(digits):
    """With balanced classes an epoch has more than `repeats` views of an image, and processes still do not matter."""
    rare = np.flatnonzero(digits.label == 3)[:2]
    chosen = np.concatenate([np.flatnonzero(digits.label == 5)[:94], rare])
    manifest = replace(digits, **{name: getattr(digits, name)[chosen] for name in PER_IMAGE})
    settings = recipe(repeats=3, class_weights="sampled", bad_limit=1.0)
    whole = run(manifest, settings, micro=32, stop_step=3)
    views: dict[tuple[int, int], np.ndarray] = {}
    for sample in whole.values():
        views[int(sample["index"]), int(sample["view"])] = sample["images"]
    assert len(views) == 96
    again = [images for (i, view), images in views.items() if manifest.label[i] == 3 and view >= 3]
    assert len(again) > 30  # 48 of 96 slots are the two rare images'
    assert len({image.tobytes() for image in again}) > len(again) - 3
    assert_same(run(manifest, settings, micro=8, world=2, stop_step=3), whole)
    resumed = run(manifest, settings, micro=16, start_step=2, stop_step=3)
    assert_same(resumed, {key: value for key, value in whole.items() if key[0] >= 2})


def test_resume_in_mid_epoch_and_across_epochs(digits):
    manifest = digits.head(100)  # 3 steps an epoch
    settings = recipe(rand_augment=PAPER)
    whole = run(manifest, settings, micro=16, stop_step=7)
    assert {value["epoch"] for value in whole.values()} == {0, 1, 2}
    for start in range(1, 7):
        resumed = run(manifest, settings, micro=16, start_step=start, stop_step=7)
        assert_same(resumed, {key: value for key, value in whole.items() if key[0] >= start})


def test_the_policy_works_on_the_cropped_and_flipped_views(digits):
    plain = run(digits, recipe(), micro=32, stop_step=1)
    settings = recipe(rand_augment=PAPER)
    policy = Augmentation(settings, SIZE, torch.device("cpu"))
    for key, sample in run(digits, settings, micro=32, stop_step=1).items():
        drawn = policy.draw(sample["index"][None], sample["epoch"], sample["view"][None])
        assert np.array_equal(sample["images"], policy.apply(torch.from_numpy(plain[key]["images"])[None], drawn)[0])


def test_an_exception_in_a_thread_reaches_the_consumer(digits, monkeypatch):
    monkeypatch.setattr(Augmentation, "apply", lambda *_: 1 // 0)
    with TrainLoader(digits, recipe(rand_augment=PAPER), SIZE, 32) as loader, pytest.raises(ZeroDivisionError):
        list(loader)


def test_the_seed_and_every_setting_have_an_effect(digits):
    base = run(digits, recipe(mix_group=4), micro=32, stop_step=1)

    def differing(**changes) -> set[str]:
        other = run(digits, recipe(**({"mix_group": 4} | changes)), micro=32, stop_step=1)
        return {name for key in base for name in base[key] if not np.array_equal(base[key][name], other[key][name])}

    assert {"index", "images", "erase", "lam", "mix_box"} <= differing(seed=1)
    assert differing(flip=0.0) == differing(crop_min=0.5) == differing(crop_max=0.5) == {"images", "input"}
    assert differing(rand_augment=PAPER) == differing(color_jitter=0.3) == {"images", "input"}
    assert differing(rand_augment="three") == {"images", "input"}
    assert differing(erase=0.9) == {"erase", "input"}
    assert differing(mixup=0.1) == {"lam", "input"}
    assert differing(cutmix=0.1) == {"lam", "mix_box", "input"}
    assert differing(mix_switch=1.0) == differing(mix_probability=0.01) == {"lam", "mix_box", "input"}
    assert {"lam", "index"} <= differing(mix_group=8)
    assert {"view", "index"} <= differing(repeats=1)


def pil_views(manifest: Manifest, batch: Batch, settings: Recipe, size: int) -> np.ndarray:
    """The batch's images by PIL, from the drawn rectangles: what timm's transform does with them."""
    images = []
    for i, view in zip(batch.index.tolist(), batch.view.tolist(), strict=True):
        image = Image.open(io.BytesIO(manifest.read(i).tobytes())).convert("RGB")
        at = (np.array([i]), int(batch.epoch), np.array([view]), settings.seed)
        scale = (settings.crop_min, settings.crop_max)
        box = draws.random_resized_crop(manifest.width[[i]], manifest.height[[i]], *at, scale)[0]
        top, left, height, width = box.tolist()
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        if draws.flip(*at, settings.flip)[0]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(np.asarray(image))
    return np.stack(images)


def check_train_pixels(manifest: Manifest, settings: Recipe, size: int) -> None:
    with TrainLoader(manifest, settings, size, settings.batch, stop_step=1) as loader:
        (batch,) = loader
    difference = np.abs(batch.images.numpy().astype(int) - pil_views(manifest, batch, settings, size))
    assert difference.mean() <= 0.1
    assert difference.max() <= 8  # PIL itself is up to 12 from the exact filter


@pytest.mark.parametrize("repeats", [1, 3])
def test_train_pixels_are_pils(make_folder, repeats):
    check_train_pixels(open_dataset(str(make_folder())).train, recipe(batch=18, repeats=repeats), 48)


@pytest.mark.parametrize("repeats", [1, 3])
def test_train_pixels_are_pils_on_real_images(shared_data, repeats):
    sample = open_dataset(str(shared_data / "imagenet-sample"), split="val", classes="imagenet").val
    check_train_pixels(sample, recipe(batch=60, repeats=repeats), 112)


def test_one_view_decoded_alone_is_the_same_as_among_three(shared_data):
    # One view decodes only its rectangle; with three the whole image is decoded first.
    sample = open_dataset(str(shared_data / "imagenet-sample"), split="val", classes="imagenet").val
    with TrainLoader(sample, recipe(batch=60, repeats=1), 64, 60, stop_step=1) as loader:
        (alone,) = loader
    with TrainLoader(sample, recipe(batch=60, repeats=3), 64, 60, stop_step=4) as loader:
        views = {
            int(i): image
            for batch in loader
            for i, view, image in zip(batch.index, batch.view, batch.images, strict=True)
            if view == 0
        }
    shared = [(image, views[int(i)]) for i, image in zip(alone.index, alone.images, strict=True) if int(i) in views]
    assert len(shared) >= 40
    assert all(torch.equal(a, b) for a, b in shared)


class DaliTrainLoader(TrainLoader):
    """The loader with the GPU's DALI graph, all of it on the CPU."""

    _on_cpu = property(lambda self: False, lambda self, value: None)


class DaliEvalLoader(EvalLoader):
    _on_cpu = property(lambda self: False, lambda self, value: None)


@pytest.fixture
def graph_on_cpu(monkeypatch):
    monkeypatch.setattr(dali, "decode_to_gpu", lambda encoded, _: dali.decode(encoded, "cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)


def test_the_gpus_graph_crops_resizes_and_flips_alike(make_folder, graph_on_cpu):
    manifest = open_dataset(str(make_folder())).train
    settings = recipe(batch=18, repeats=3, rand_augment="none")
    with TrainLoader(manifest, settings, 48, 6, stop_step=1) as loader:
        expected = list(loader)
    with DaliTrainLoader(manifest, settings, 48, 6, stop_step=1) as loader:
        for ours, theirs in zip(expected, loader, strict=True):
            difference = (ours.images.int() - theirs.images.int()).abs().float()
            assert difference.mean() <= 0.3
            assert difference.mean((1, 2, 3)).max() <= 1.0  # no single image is shifted or mirrored
    plain = torch.cat([images for images, _ in EvalLoader(manifest, 32, 0.9, batch=7)]).int()
    dali = torch.cat([images for images, _ in DaliEvalLoader(manifest, 32, 0.9, batch=7)]).int()
    assert (plain - dali).abs().float().mean((1, 2, 3)).max() <= 1.0


def test_where_images_are_decoded(digits, monkeypatch):
    def choose(decode: str, device: str, speed: dict[str, float]) -> tuple[str, list[str]]:
        said: list[str] = []
        monkeypatch.setattr(decoder, "gpu_problem", lambda *_: "")
        monkeypatch.setattr(decoder, "_images_per_second", lambda m, s, device, where, threads: speed[where])
        return decoder.choose_decoder(decode, digits, SIZE, torch.device(device), 8, said.append), said

    assert choose("auto", "cpu", {}) == choose("cpu", "cpu", {}) == choose("cpu", "cuda", {}) == ("cpu", [])
    assert choose("gpu", "cuda", {}) == ("gpu", [])
    for gpu, cpu, expected in ((4000.0, 1000.0, "gpu"), (1000.0, 4000.0, "cpu")):
        chosen, (line,) = choose("auto", "cuda", {"gpu": gpu, "cpu": cpu})
        assert chosen == expected
        assert f"decoding on the {expected.upper()}: measured {gpu:,.0f} images/s on the GPU and {cpu:,.0f}" in line
    with pytest.raises(DeitfastError, match="--decode gpu needs a GPU"):
        TrainLoader(digits, recipe(decode="gpu"), SIZE, 32)


@pytest.mark.parametrize(("known", "fits"), [(12, False), (13, True), (14, True), (0, True)])
def test_a_driver_older_than_dalis_build_is_told_which_build_to_install(monkeypatch, known: int, fits: bool) -> None:
    monkeypatch.setattr("nvidia.dali.__cuda_version__", 13492)  # 13.4.92
    monkeypatch.setattr(dali, "_cuda_of_driver", lambda: known)
    dali.check_build(torch.device("cpu"))
    if fits:
        dali.check_build(torch.device("cuda", 0))
        return
    with pytest.raises(DeitfastError, match=rf"built for CUDA 13 .* knows CUDA {known}.*deitfast\[cuda{known}\]"):
        dali.check_build(torch.device("cuda", 0))


def check_eval_pixels(manifest: Manifest, size: int, ratio: float) -> None:
    transforms = import_torchvision().transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(int(size / ratio), bicubic), transforms.CenterCrop(size)])
    ours = torch.cat([images for images, _ in EvalLoader(manifest, size, ratio, batch=40, workers=2)]).numpy()
    for i in range(len(manifest)):
        image = Image.open(io.BytesIO(manifest.read(i).tobytes())).convert("RGB")
        difference = np.abs(ours[i].astype(int) - np.asarray(theirs(image)))
        assert difference.max() <= 8, manifest.name(i)
        ours[i] = difference
    assert ours.mean() <= 0.1


@pytest.mark.parametrize(("size", "ratio"), [(48, 0.875), (45, 0.9), (24, 1.0)])
def test_eval_pixels_are_torchvisions(make_folder, size, ratio):
    check_eval_pixels(open_dataset(str(make_folder())).train, size, ratio)


@pytest.mark.parametrize("ratio", [0.875, 0.9, 1.0])
def test_eval_pixels_are_torchvisions_on_real_images(shared_data, ratio):
    manifest = open_dataset(str(shared_data / "imagenet-sample"), split="val", classes="imagenet").val
    check_eval_pixels(manifest.head(40), 224, ratio)


def test_eval_geometry_is_torchvisions():
    functional = import_torchvision().transforms.functional
    sides = [(w, h) for w in range(1, 40, 3) for h in range(1, 400, 7)] + [(500, 375), (256, 256), (4288, 2848)]
    for size, ratio in ((224, 0.875), (384, 1.0), (17, 0.9)):
        short = int(size / ratio)
        ours, start = eval_geometry(*np.array(sides).T, size, ratio)
        for (w, h), mine, at in zip(sides, ours.tolist(), start.tolist(), strict=True):
            height, width = functional._compute_resized_output_size((h, w), [short])
            assert mine == [height, width]
            assert at == [round((height - size) / 2), round((width - size) / 2)]
            assert min(at) >= 0  # so torchvision's padding of small images never applies


@pytest.mark.parametrize(("world", "ratio"), [(1, 0.875), (3, 0.9), (7, 1.0)])
def test_eval_sees_every_image_once_in_order(digits, world, ratio):
    manifest = digits.head(20)
    pixels, labels = [], []
    for rank in range(world):
        loader = EvalLoader(manifest, 16, ratio, batch=4, rank=rank, world_size=world, workers=1)
        batches = list(loader)
        assert len(batches) == len(loader)
        pixels += [images for images, _ in batches]
        labels += [y for _, y in batches]
    assert torch.cat(labels).tolist() == manifest.label.tolist()
    whole = torch.cat([images for images, _ in EvalLoader(manifest, 16, ratio, batch=20, workers=1)])
    assert torch.equal(torch.cat(pixels), whole)
    assert list(EvalLoader(manifest.head(2), 16, rank=0, world_size=3)) == []  # a share may be empty


def test_exif_orientation_is_ignored_and_gray_becomes_rgb(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        picture(60, 40, 1).save(tmp_path / split / "a" / "turned.jpg", exif=exif, quality=95)
        picture(50, 50, 2).convert("L").save(tmp_path / split / "a" / "gray.jpg", quality=95)
        picture(50, 50, 3).convert("CMYK").save(tmp_path / split / "a" / "cmyk.jpg", quality=95)
        picture(45, 50, 4).save(tmp_path / split / "a" / "png.jpg", "PNG")
        picture(45, 50, 5).save(tmp_path / split / "a" / "webp.webp", quality=95)
        picture(45, 50, 6).save(tmp_path / split / "a" / "bmp.bmp")
        picture(45, 51, 7).save(tmp_path / split / "a" / "progressive.jpg", progressive=True)
    data = open_dataset(str(tmp_path))
    assert len(data.val) == 7
    check_eval_pixels(data.val, 32, 0.875)


def test_errors_of_batches(digits):
    for settings, micro, world, expected in (
        (recipe(batch=33), 33, 1, "--batch is 33, odd, but mixup and cutmix mix pairs"),
        (recipe(batch=36), 9, 1, "--micro-batch is 9, odd"),
        (recipe(), 12, 1, "batch 32 is not a multiple of 1 processes x micro-batch 12"),
        (recipe(), 16, 3, "batch 32 is not a multiple of 3 processes x micro-batch 16"),
        (recipe(batch=2048), 2048, 1, "1437 training images do not fill one batch of 2048"),
    ):
        with pytest.raises(DeitfastError, match=expected):
            TrainLoader(digits, settings, SIZE, micro, world_size=world)


def test_an_odd_batch_without_mixing(digits):
    settings = recipe(batch=33, mixup=0.0, cutmix=0.0)
    seen = run(digits, settings, micro=11, stop_step=1)
    assert len(seen) == 33
    assert all(value["lam"] == 1 and value["partner"] == value["labels"] for value in seen.values())


def test_a_wait_while_the_consumer_is_busy_is_none(digits, monkeypatch):
    prepare, gate = TrainLoader._prepare, threading.Event()
    monkeypatch.setattr(TrainLoader, "_prepare", lambda self, i: (gate.wait(), prepare(self, i))[1])
    with TrainLoader(digits, recipe(), SIZE, 32, stop_step=2) as loader:
        asked = iter(range(5))  # busy the first times that it is asked, until the batches come

        def busy() -> bool:
            if next(asked, None) == 4:
                gate.set()
            return True

        loader.count_waits_unless(busy)
        assert len(list(loader)) == 2
        assert loader.seconds_waiting == 0


def test_loaders_can_be_left_early_and_made_again(digits):
    threads = threading.active_count()
    for _ in range(5):
        with TrainLoader(digits, recipe(), SIZE, 16) as loader:
            assert next(iter(loader)).images.shape == (16, SIZE, SIZE, 3)
            assert loader.seconds_waiting > 0
        next(iter(EvalLoader(digits, SIZE, batch=8, workers=1)))
    gc.collect()
    assert threading.active_count() <= threads + 1
    loader = TrainLoader(digits, recipe(), SIZE, 16)
    loader.close()  # never iterated
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(iter(loader))
