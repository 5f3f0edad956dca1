"""Inference and prediction on the pretended device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.paper.training import write_subset
from deitfast.cli import train as training
from deitfast.cli.main import main
from deitfast.data import dali
from deitfast.errors import DeitfastError
from deitfast.model.acceleration import accelerate
from deitfast.model.factory import create_model, load_model
from deitfast.model.preprocessing import Preprocessing
from deitfast.training.environment import environment
from deitfast.use import images
from deitfast.use.inference import Predictor, pick_device
from deitfast.use.predict import Classifier
from tests.test_inference import pixels
from tests.test_weights import small

NAME = "deit_digits_patch4_16"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_graphs_of_every_size_give_what_a_cpu_gives(device: str) -> None:
    model = small(distilled=True, image_size=32, patch_size=8, num_heads=1)
    exact, graphed = Predictor(model, "cpu", "fp32"), Predictor(model, device, "fp32")
    for batch in (1, 3, 8, 300, 2, 1) if device == "cuda" else (3, 2):
        expected = exact(pixels(batch, 32))
        torch.testing.assert_close(graphed(pixels(batch, 32)).cpu(), expected, rtol=1e-5, atol=1e-4)
    assert set(graphed._graphed.captured) == ({1, 2, 4, 8, 64, 256} if device == "cuda" else {4, 2})
    assert graphed(pixels(0, 32)).shape == (0, 5)


def test_without_graphs_too() -> None:
    model = small(image_size=32, patch_size=8, num_heads=1)
    predictor = Predictor(model, "auto", graphs=False)
    assert predictor.how == "bf16, fused blocks, no CUDA graphs"
    expected = Predictor(model, "cpu")(pixels(3, 32))
    assert (predictor(pixels(3, 32)).cpu() - expected).norm() < 2.0**-5 * expected.norm()


def test_the_device_is_chosen_and_missed_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DeitfastError, match="no CUDA device here"):
        pick_device("cuda")
    with pytest.raises(DeitfastError, match="precision 'int8' unknown"):
        Predictor(small(), "cpu", "int8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Enough files for DALI to take over, of which number 3 is no image."""
    folder, rng, paths = tmp_path_factory.mktemp("photos"), np.random.default_rng(0), []
    for i in range(images.DALI_FROM + 3):
        path = Path(folder, f"{i}.jpg")
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    Path(paths[3]).write_bytes(b"no image")
    return paths


def test_many_files_go_through_dali_and_a_bad_one_is_named(photos: list[str]) -> None:
    found: dict[str, dict[int, torch.Tensor]] = {}
    for device in ("cuda:0", "cpu"):
        found[device], bad = {}, []
        for numbers, tensor, broken in images.batches(photos, 32, Preprocessing(), 16, torch.device(device)):
            assert tensor.device.type == device.split(":")[0] or not numbers
            bad += broken
            found[device] |= dict(zip(numbers, tensor.cpu().float(), strict=True))
        assert [i for i, _ in bad] == [3]
    assert found["cuda:0"].keys() == found["cpu"].keys()
    # DALI's resize and PIL's round differently.
    assert max((x - found["cpu"][i]).abs().mean().item() for i, x in found["cuda:0"].items()) < 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    model = create_model(NAME, num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("weights") / "x.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


def test_a_picture_is_classified_as_on_a_cpu(photos: list[str], weights: str) -> None:
    gpu, cpu = (
        Classifier(load_model(NAME, weights), device, precision="fp32")(photos[0]) for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(gpu["pred_scores"], cpu["pred_scores"], atol=1e-4)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four validation images of every digit."""
    folder = tmp_path_factory.mktemp("few")
    write_subset("digits", folder, 1, 4)
    return str(folder)


def test_weights_are_tested_as_on_a_cpu(weights: str, few: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    command = ["test", "--model", NAME, "--weights", weights, "--data", few, "--json"]
    for device in ("auto", "cpu"):
        main([*command, "--device", device])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["images"] == found[1]["images"] == 40
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.1)  # bf16, and another resize


def test_weights_are_tested_with_the_decoder_that_is_asked_for(
    weights: str, few: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(dali, "decode_to_gpu", lambda x, where: (used.append(where), dali.decode(x, "cpu"))[1])
    for decode in ("auto", "gpu", "cpu"):
        main(["test", "--model", NAME, "--weights", weights, "--data", few, "--json", "--decode", decode])
    assert used == ["gpu", "gpu", "cpu"]
    capsys.readouterr()


def test_an_accelerated_model_gives_what_its_own_blocks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        model = small(image_size=32, patch_size=8, num_heads=1)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected = model(images)
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda there=there: there)
                assert len(accelerate(model, verbose=False).replaced) == 2
            found = model.to("cuda" if there else "cpu")(images.to("cuda" if there else "cpu"))
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_a_process_is_started_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(training, "_launch", lambda arguments, _: started.append(arguments))
    main(["train", "recipes/deit_digits.py"])
    assert "--nproc-per-node=4" in started[0]


def test_the_environment_tells_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment()["gpu"]["name"] == "Pretended H100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment()["gpu"] is None
