"""Images in, classes out: every kind of input, the same scores as timm's pipeline, and the command."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deitfast.cli.main import main
from deitfast.data import EvalLoader, normalise, open_dataset
from deitfast.errors import DeitfastError
from deitfast.model.factory import create_model
from deitfast.model.preprocessing import Preprocessing
from deitfast.use import images as images_module
from deitfast.use.images import batches, centre_crop, find_images, open_image
from deitfast.use.predict import annotate, get_model, inference_model

NAME = "deit_digits_patch4_16"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model(NAME, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    save_file(model.state_dict(), path, metadata={"classes": json.dumps(["red", "green", "blue"])})
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Smooth random pictures of several sizes and formats."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    paths = []
    for i, (size, suffix) in enumerate([((40, 30), "png"), ((30, 41), "jpg"), ((16, 16), "bmp"), ((120, 33), "webp")]):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = folder / f"{i}.{suffix}"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def test_the_result_has_mmpretrains_keys(weights: Path, photos: list[Path]) -> None:
    result = inference_model(NAME, photos[0], weights, device="cpu")
    assert isinstance(result, dict)
    assert set(result) == {"pred_label", "pred_class", "pred_score", "pred_scores"}
    assert result["pred_scores"].shape == (3,)
    assert result["pred_scores"].dtype == np.float32
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-5)
    assert result["pred_label"] == result["pred_scores"].argmax()
    assert result["pred_score"] == result["pred_scores"].max()
    assert result["pred_class"] == ("red", "green", "blue")[result["pred_label"]]


def test_every_kind_of_image_gives_the_same_scores(weights: Path, photos: list[Path]) -> None:
    image = Image.open(photos[0])
    kinds = [
        str(photos[0]),
        photos[0],
        photos[0].read_bytes(),
        image,
        np.asarray(image),
        torch.tensor(np.asarray(image)),
    ]
    together = inference_model(NAME, kinds, weights, device="cpu")
    scores = [inference_model(NAME, kind, weights, device="cpu")["pred_scores"] for kind in kinds]
    for one, among_others in zip(scores, together, strict=True):
        np.testing.assert_array_equal(one, scores[0])
        # The bits of a product may depend on the image's place in the batch, where several threads share it.
        np.testing.assert_allclose(among_others["pred_scores"], scores[0], atol=1e-6)


def test_a_list_gives_what_its_images_give_one_by_one(weights: Path, photos: list[Path]) -> None:
    together = inference_model(NAME, photos * 9, weights, device="cpu")
    assert len(together) == 36
    for path, result in zip(photos * 9, together, strict=True):
        alone = inference_model(NAME, path, weights, device="cpu")
        np.testing.assert_allclose(result["pred_scores"], alone["pred_scores"], atol=1e-6)


def test_a_model_and_class_names_can_be_given(weights: Path, photos: list[Path]) -> None:
    model = create_model(NAME, str(weights), num_classes=3).train()
    expected = inference_model(NAME, photos[0], weights, device="cpu")
    found = inference_model(model, photos[0], device="cpu", classes=["a", "b", "c"])
    np.testing.assert_array_equal(found["pred_scores"], expected["pred_scores"])
    assert found["pred_class"] == "abc"[found["pred_label"]]
    assert model.training
    named = inference_model(NAME, photos[0], weights, device="cpu", classes=["a", "b", "c"])
    assert named["pred_class"] == found["pred_class"]
    assert inference_model(NAME, photos[0], weights, device="cpu")["pred_class"] == expected["pred_class"]
    with pytest.raises(DeitfastError, match="this model has its own"):
        inference_model(model, photos[0], weights)


def test_get_model_knows_mmpretrains_names(weights: Path) -> None:
    model = get_model("deit-tiny_4xb256_in1k", device="cpu")
    assert (model.width, len(model.blocks)) == (192, 12)
    assert model.eval().extract_feat(torch.zeros(1, 3, 224, 224))[0].shape == (1, 192)
    assert torch.equal(get_model(NAME, str(weights), num_classes=3).norm.weight, torch.ones(128))
    with pytest.raises(DeitfastError, match="unknown"):
        get_model("resnet50_8xb32_in1k")


def test_a_changed_weight_file_is_read_again(photos: list[Path], tmp_path: Path) -> None:
    import os

    model = create_model(NAME, num_classes=3)
    scores = []
    for i in range(2):
        torch.nn.init.normal_(model.head.weight)
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        os.utime(tmp_path / "x.safetensors", ns=(i, i))
        scores.append(inference_model(NAME, photos[0], tmp_path / "x.safetensors", device="cpu")["pred_scores"])
    assert not np.array_equal(*scores)


def test_preprocessing_is_torchvisions(photos: list[Path]) -> None:
    from tests.reference import import_torchvision

    import_torchvision()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    for size, ratio in ((16, 0.875), (32, 1.0), (24, 0.9)):
        reference = Compose([Resize(int(size / ratio), InterpolationMode.BICUBIC), CenterCrop(size)])
        for path in photos:
            image = open_image(path)
            np.testing.assert_array_equal(centre_crop(image, size, Preprocessing(ratio)), np.asarray(reference(image)))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_other_colour_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (20, 20))
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    assert open_image(path).mode == "RGB"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg cannot be read: No such file"),
        (b"no image", "not a JPEG, PNG, BMP or WebP image"),
        (np.zeros((4, 4, 3)), r"array \(4, 4, 3\) of float64. Give uint8"),
        (np.zeros((4, 4, 7), np.uint8), r"array \(4, 4, 7\)"),
        (42, "does not decode"),
    ],
)
def test_what_is_no_image_is_named(source: object, message: str) -> None:
    with pytest.raises(DeitfastError, match=message):
        open_image(source)


def test_damaged_and_huge_images_are_refused(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(photos[1].read_bytes()[:-200])
    with pytest.raises(DeitfastError, match=r"cut\.jpg cannot be read"):
        open_image(tmp_path / "cut.jpg")
    Image.new("1", (13_400, 13_300)).save(tmp_path / "huge.png")
    with pytest.raises(DeitfastError, match="13400 x 13300 pixels, more than 178,000,000"):
        open_image(tmp_path / "huge.png")


def test_dali_gives_the_images_and_names_the_damaged(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of many files on a GPU, run on the CPU."""
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "cut.jpg").write_bytes(photos[1].read_bytes()[:-200])
    sources = [photos[0], tmp_path / "bad.jpg", photos[1], tmp_path / "cut.jpg", tmp_path / "none.png", photos[3]]
    found, bad = {}, {}
    for index, tensor, failed in images_module._dali_batches(sources, 16, Preprocessing(), 2, torch.device("cpu")):
        found |= dict(zip(index, tensor.numpy(), strict=True))
        bad |= dict(failed)
    assert sorted(found) == [0, 2, 5]
    assert sorted(bad) == [1, 3, 4]
    assert all("\n" not in reason for reason in bad.values())
    for i, image in found.items():
        expected = centre_crop(open_image(sources[i]), 16, Preprocessing()).astype(int)
        assert np.abs(image - expected).max() <= 3  # another resize and another JPEG decoder


def test_batches_are_in_order_and_name_the_unreadable(photos: list[Path]) -> None:
    sources = [*photos, b"no image", *photos]
    seen, bad = [], []
    for index, tensor, failed in batches(sources, 16, Preprocessing(), 3, torch.device("cpu")):
        assert len(index) == len(tensor)
        seen += index
        bad += failed
    assert seen == [0, 1, 2, 3, 5, 6, 7, 8]
    assert [i for i, _ in bad] == [4]
    assert bad[0][1].startswith("image 4 is not")


# The command ---------------------------------------------------------------------------------------------------------


def predict(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    main(["predict", *arguments, "--device", "cpu"])
    return capsys.readouterr().out


def test_files_folders_and_globs(photos: list[Path], tmp_path: Path) -> None:
    folder = photos[0].parent
    assert find_images([str(folder)]) == [str(p) for p in photos]
    assert find_images([str(folder / "*.png"), str(photos[1])]) == [str(photos[0]), str(photos[1])]
    with pytest.raises(DeitfastError, match=r"no image at .*Did you mean 0.png\?"):
        find_images([str(folder / "O.png")])
    with pytest.raises(DeitfastError, match="no image at"):
        find_images([str(tmp_path)])


def test_text_json_and_csv_agree(weights: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, common = str(photos[0].parent), ("--weights", str(weights), "--top", "2")
    text = predict(capsys, folder, *common).splitlines()
    assert text[0] == str(photos[0])
    assert len(text) == 4 * 3
    objects = [json.loads(line) for line in predict(capsys, folder, *common, "--json").splitlines()]
    rows = list(csv.DictReader(io.StringIO(predict(capsys, folder, *common, "--csv"))))
    assert [o["file"] for o in objects] == [str(p) for p in photos]
    for i, found in enumerate(objects):
        assert [c["class"] for c in found["top"]] == [r["class"] for r in rows[2 * i : 2 * i + 2]]
        assert f"{100 * found['top'][0]['score']:.2f} %  {found['top'][0]['class']}" in text[3 * i + 1]
        assert found["top"][0]["score"] >= found["top"][1]["score"]


def test_unreadable_images_are_told_and_the_rest_predicted(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit) as raised:
        main(["predict", str(photos[0]), str(tmp_path / "bad.jpg"), "--weights", str(weights), "--json"])
    assert raised.value.code == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert captured.err == f"error: {tmp_path}/bad.jpg is not a JPEG, PNG, BMP or WebP image\n"
    with pytest.raises(SystemExit) as raised:
        main(["predict", str(tmp_path / "bad.jpg"), "--weights", str(weights), "--json"])
    assert raised.value.code == 2
    assert "none of the 1 image(s) could be read" in capsys.readouterr().err


def test_show_writes_annotated_images(
    weights: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(capsys, str(photos[0]), str(photos[0]), "--weights", str(weights), "--show", str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0-2.jpg", "0.jpg"]
    picture = annotate(Image.new("RGB", (400, 100), "red"), [("cat", 1.0), ("dog", 0.0)])
    assert picture.size[0] == 400
    assert picture.size[1] > 100
    assert picture.getpixel((200, 50)) == (255, 0, 0)
    pixels = np.asarray(picture)
    assert (pixels[105:, 399] == (176, 213, 178)).all(-1).any()  # a bar of full length
    assert not (pixels[-8:, 100] == (176, 213, 178)).all(-1).any()  # and one of none


@pytest.mark.slow
def test_scores_on_real_photos_equal_timms_pipeline(shared_data: Path, timm) -> None:
    from timm.data import create_transform

    weights = shared_data / "weights" / "deit_tiny_patch16_224.safetensors"
    paths = sorted((shared_data / "imagenet-sample").glob("*/*"))[::12]
    theirs = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(weights)).eval()
    transform = create_transform(224, crop_pct=0.875, interpolation="bicubic")
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        expected = theirs(batch).softmax(1).numpy()
    results = inference_model("deit-tiny_4xb256_in1k", paths, weights, device="cpu")
    for row, result in zip(expected, results, strict=True):
        np.testing.assert_allclose(result["pred_scores"], row, atol=1e-3)
        assert result["pred_label"] == row.argmax()


@pytest.mark.slow
def test_labels_of_real_photos(shared_data: Path) -> None:
    weights = shared_data / "weights" / "deit_tiny_patch16_224.safetensors"
    for synset, name in (
        ("n02110341", "dalmatian"), ("n07745940", "strawberry"), ("n02504458", "African elephant"),
        ("n02130308", "cheetah"),
    ):  # fmt: skip
        for path in sorted((shared_data / "imagenet-sample" / synset).glob("*")):
            result = inference_model("deit_tiny_patch16_224", path, weights, device="cpu")
            assert result["pred_class"].startswith(name), (path, result["pred_class"])


def test_preprocessing_agrees_with_evaluations(shared_data: Path) -> None:
    data = open_dataset(str(shared_data / "imagenette"), split="val").val
    assert data is not None
    data = data.head(8)
    for images, _ in EvalLoader(data, image_size=96, batch=8):
        for i, image in enumerate(images.numpy()):
            mine = centre_crop(open_image(f"{data.root}/{data.name(i)}"), 96, Preprocessing())
            assert np.abs(image.astype(int) - mine).max() <= 2  # PyTorch's bicubic against PIL's
    assert normalise(images).shape == (8, 3, 96, 96)
