"""Exports: state dicts load back exactly, ONNX and torch.export compute the same at any batch size."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deitfast.cli.main import main
from deitfast.data import normalise
from deitfast.errors import DeitfastError
from deitfast.model.convert import to_huggingface
from deitfast.model.factory import LoadedModel, create_model, load_model
from deitfast.model.fused import fuse
from deitfast.model.preprocessing import Preprocessing
from deitfast.use.export import export, exported_program
from deitfast.use.images import centre_crop
from tests.reference import import_transformers
from tests.test_weights import VARIETIES, assert_close, images, same, small

NAME = "deit_digits_patch4_16"
CLASSES = ("a", "b", "c", "d", "e")


def loaded(**options: Any) -> LoadedModel:
    return LoadedModel(small(**options), "small", CLASSES, Preprocessing(0.875))


@pytest.mark.parametrize("format", ["timm", "safetensors", "mmpretrain"])
@pytest.mark.parametrize("variety", VARIETIES)
def test_state_dicts_round_trip_exactly(format: str, variety: str, tmp_path: Path) -> None:
    from deitfast.model.convert import to_ours
    from deitfast.model.weights import read_weights

    model = loaded(**VARIETIES[variety])
    path = export(model, format, tmp_path / "new" / "x")
    assert path.suffix == (".pth" if format == "mmpretrain" else ".safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert same(to_ours(read_weights(path).tensors), model.model.state_dict())
    if format != "timm":
        assert read_weights(path).classes == CLASSES


def test_timm_loads_ours_strictly(timm, tmp_path: Path) -> None:
    for name in ("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"):
        model = create_model(name, num_classes=3).eval()
        path = export(LoadedModel(model, name, ("a", "b", "c"), Preprocessing(1.0)), "timm", tmp_path / name)
        theirs = timm.create_model(name, num_classes=3, checkpoint_path=str(path))
        assert same(theirs.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("variety", "head_dist", "kind"),
    [
        ("plain", True, "ViTForImageClassification"),
        ("distilled", True, "DeiTForImageClassificationWithTeacher"),
        ("distilled", False, "DeiTForImageClassification"),
    ],
)
def test_transformers_loads_ours_strictly(variety: str, head_dist: bool, kind: str, tmp_path: Path) -> None:
    transformers = import_transformers()

    model = loaded(**VARIETIES[variety])
    if not head_dist:
        torch.nn.init.zeros_(model.model.head_dist.weight)
        torch.nn.init.zeros_(model.model.head_dist.bias)
    folder = export(model, "hf", tmp_path / "hf")
    theirs, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        assert_close(theirs.eval()(images()).logits, model.model(images()))
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.layer_norm_eps == 1e-6
    back = small(**VARIETIES[variety])
    from deitfast.model.weights import load_weights

    load_weights(back, folder)
    assert same(back.state_dict(), model.model.state_dict())
    with pytest.raises(DeitfastError, match=r"exists\. Give a new name, or --force"):
        export(model, "hf", folder)
    assert export(model, "hf", folder, force=True) == folder
    assert same(load_file(folder / "model.safetensors"), to_huggingface(model.model.state_dict())[1])
    with pytest.raises(DeitfastError, match="no DeiT with LayerScale"):
        export(loaded(layer_scale=0.1), "hf", tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_transformers_preprocesses_as_we_do(tmp_path: Path) -> None:
    """But where an odd number of pixels is cut away: its crop then begins one pixel earlier."""
    transformers = import_transformers()

    folder = export(replace(loaded(), preprocessing=Preprocessing(0.75)), "hf", tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((60, 41), Image.Resampling.BICUBIC)
    theirs = torch.as_tensor(np.array(processor(image)["pixel_values"]))
    ours = normalise(torch.tensor(centre_crop(image, 24, Preprocessing(0.75))[None]))
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 0.06  # three levels of 255: another bicubic


@pytest.mark.parametrize("variety", VARIETIES)
def test_exported_programs_take_any_batch(variety: str, tmp_path: Path) -> None:
    model = loaded(**VARIETIES[variety])
    fuse(model.model)  # the program holds none of our own ops all the same
    path = export(model, "exported", tmp_path / "x")
    extra = {"deitfast.json": ""}
    program = torch.export.load(path, extra_files=extra)
    assert "deitfast" not in str(program.graph)
    assert json.loads(extra["deitfast.json"])["model"] == "small"
    for batch in (1, 2, 7):
        with torch.no_grad():
            assert_close(program.module()(images(batch)), model.model(images(batch)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt2"]


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)


@needs_onnx
@pytest.mark.parametrize("variety", VARIETIES)
def test_onnx_agrees_with_onnxruntime_at_any_batch(variety: str, tmp_path: Path) -> None:
    import onnxruntime

    model = loaded(**VARIETIES[variety])
    path = export(model, "onnx", tmp_path / "x")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        (logits,) = session.run(["logits"], {"images": images(batch).numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(logits), model.model(images(batch)))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert facts["image_size"] == "24"
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


@needs_onnx
@pytest.mark.slow
def test_real_weights_through_onnx_and_torch_export(shared_data: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = load_model(None, shared_data / "weights" / "deit_tiny_patch16_224.safetensors")
    x = images(3, 224)
    with torch.no_grad():
        expected = model.model(x)
        assert_close(exported_program(model.model).module()(x), expected)
    session = onnxruntime.InferenceSession(str(export(model, "onnx", tmp_path / "x")))
    (logits,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_without_onnx_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeitfastError, match=r"needs onnx and onnxscript: pip install 'deitfast\[onnx\]'"):
        export(loaded(), "onnx", tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DeitfastError, match="format 'pickle' unknown"):
        export(loaded(), "pickle", tmp_path / "x")
    (tmp_path / "file").touch()
    with pytest.raises(DeitfastError, match="cannot write"):
        export(loaded(), "timm", tmp_path / "file" / "x")


def test_the_command_exports_with_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = create_model(NAME, num_classes=2)
    save_file(model.state_dict(), tmp_path / "in.safetensors", metadata={"classes": json.dumps(["no", "yes"])})
    out = tmp_path / "out.safetensors"
    main(["export", str(out), "--weights", str(tmp_path / "in.safetensors"), "--format", "safetensors"])
    assert capsys.readouterr().out == f"{out}\n"
    assert same(load_file(out), model.state_dict())
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["model"] == NAME
        assert json.loads(file.metadata()["classes"]) == ["no", "yes"]


@pytest.mark.parametrize("format", ["timm", "safetensors", "mmpretrain", "exported"])
def test_nothing_is_overwritten_unless_asked_for(format: str, tmp_path: Path) -> None:
    path = export(loaded(), format, tmp_path / "x")
    before = path.read_bytes()
    with pytest.raises(DeitfastError, match=r"exists\. Give a new name, or --force \(force=True\) to replace it"):
        export(loaded(), format, path)
    assert path.read_bytes() == before
    export(loaded(), format, path, force=True)
    with pytest.raises(DeitfastError, match="is a file, and Hugging Face's format a folder"):
        export(loaded(), "hf", path, force=True)
    with pytest.raises(DeitfastError, match="is a folder, and no exported model"):
        export(loaded(), "hf", tmp_path, force=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
