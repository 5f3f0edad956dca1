"""Weights as their authors leave them: what lies around the tensors, how they are fed, and what their classes are."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import json
import os
import pathlib
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from deitfast import create_model, get_model, inference_model
from deitfast.cli.main import main
from deitfast.data import EvalLoader, open_dataset
from deitfast.errors import DeitfastError
from deitfast.model.class_names import head_order, imagenet_names, labels_by_name
from deitfast.model.convert import to_huggingface, to_mmpretrain
from deitfast.model.factory import load_model
from deitfast.model.preprocessing import IMAGENET_MEAN, Preprocessing
from deitfast.model.unpickling import StandIn, load
from deitfast.model.weights import load_weights, read_weights
from deitfast.use.images import centre_crop
from deitfast.use.predict import Classifier
from tests.reference import import_transformers

MODEL = "deit_digits_patch4_16"
COLOURS = {"apple": (200, 30, 30), "banana": (220, 210, 40), "cherry": (120, 10, 60), "date": (110, 70, 30)}


def network(classes: int = 4, seed: int = 0, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = create_model(MODEL, num_classes=classes, fused=False, **options).eval()
    with torch.no_grad():
        for _, head in model.heads():
            torch.nn.init.normal_(head.weight)
            torch.nn.init.normal_(head.bias)
    return model


def state(**options: Any) -> dict[str, Tensor]:
    return {k: v.clone().contiguous() for k, v in network(**options).state_dict().items()}


def colour_model(names: list[str]) -> dict[str, Tensor]:
    """Weights that tell plain colours apart, their head's rows in the order of `names`."""
    model = network(len(names))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor((0.229, 0.224, 0.225))
    colours = [((torch.tensor(COLOURS[name]) / 255 - mean) / std)[:, None, None].expand(3, 16, 16) for name in names]
    with torch.no_grad():
        features = model.extract_feat(torch.stack(colours))[0]
        centred = features - features.mean(0)
        rows = 8 * centred / centred.norm(dim=1, keepdim=True) ** 2
        model.head.weight.copy_(rows)
        model.head.bias.copy_(-(rows * features.mean(0)).sum(1))
    return {k: v.clone().contiguous() for k, v in model.state_dict().items()}


def photos(root: Path, names: dict[str, str], count: int = 2) -> Path:
    """Class folders: folder name -> colour."""
    for k, (folder, colour) in enumerate(names.items()):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(10 * k + i).normal(0, 8, (24, 20, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


# Reading -------------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Settings:
    def __init__(self) -> None:
        self.lr = 0.1


def history_buffer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An object of a library that is not installed where the file is read."""
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    kind = type("HistoryBuffer", (), {"__module__": names[2]})
    modules[names[2]].HistoryBuffer = kind  # type: ignore[attr-defined]
    buffer = kind()
    buffer._log_history = np.zeros(3)
    return buffer


@pytest.mark.parametrize("zipped", [True, False])
def test_what_lies_beside_the_tensors_is_put_in_place_by_stand_ins(zipped, tmp_path, monkeypatch):
    beside = {
        "path": pathlib.PosixPath("/a"),
        "args": argparse.Namespace(lr=5e-4, output_dir=pathlib.PosixPath("/a")),
        "metric": np.float64(3.0),
        "array": np.zeros(3),
        "when": datetime.datetime(2020, 1, 1),
        "took": datetime.timedelta(1),
        "colour": Colour.RED,
        "settings": Settings(),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "queue": collections.deque([1, 2]),
        "set": {1, 2},
        "log": history_buffer(monkeypatch),
    }
    monkeypatch.setattr(Settings, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Settings", Settings, raising=False)
    monkeypatch.setattr(Colour, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Colour", Colour, raising=False)
    torch.save({"model": state(), **beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, name)
    found = read_weights(tmp_path / "x.pth").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state().items())
    assert isinstance(load(tmp_path / "x.pth")["settings"], StandIn)


class Calls:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


@pytest.mark.parametrize(
    "function", [os.system, eval, exec, getattr, __import__, os.open, pickle.loads, torch.load, torch.hub.load]
)
def test_a_function_is_never_called(function, tmp_path):
    mark = tmp_path / "executed"
    argument = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    torch.save({"model": state(), "path": pathlib.PosixPath("/a"), "x": Calls(function, argument)}, tmp_path / "x.pth")
    with pytest.raises(DeitfastError, match="holds more than tensors and is not loaded") as raised:
        read_weights(tmp_path / "x.pth")
    assert "torch.save(model.state_dict(), FILE)" in str(raised.value)
    assert not mark.exists()


def test_no_attribute_of_a_class_is_set(tmp_path):
    import zipfile

    # Tensor, (None, {"numel": 1}), BUILD; then a name that sends the file to the unpickler with stand-ins.
    program = b"\x80\x02ctorch\nTensor\nN}X\x05\x00\x00\x00numelK\x01s\x86b0cpathlib\nPath\n."
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(DeitfastError):
        read_weights(tmp_path / "b.pth")
    assert callable(torch.Tensor.numel)


def wrapped(prefix: str, **more: Any) -> Callable[[dict[str, Tensor]], dict[str, Any]]:
    return lambda s: {"state_dict": {prefix + k: v for k, v in s.items()} | more}


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "net": lambda s: {"net": s, "acc": 91.2},
    "unknown key": lambda s: {"my_vit": s, "history": {"a": [1.0]}},
    "nested twice": lambda s: {"checkpoint": {"model": s}, "epoch": 1},
    "DeepSpeed": lambda s: {"module": {f"module.{k}": v for k, v in s.items()}, "global_steps": 1},
    "Lightning": wrapped("model."),
    "Lightning with a net and a loss": wrapped("net.", **{"criterion.weight": torch.ones(4)}),
    "Lightning, compiled": wrapped("model._orig_mod."),
    "DDP in Lightning": wrapped("module.model."),
    "wrapper module": wrapped("encoder."),
    "raw and average in one dict": lambda s: {f"model.{k}": v for k, v in s.items()}
    | {f"ema_model.{k}": v + 1 for k, v in s.items() if v.is_floating_point()},
    "mmpretrain": lambda s: {"state_dict": to_mmpretrain(s), "meta": {"epoch": 3}},
    "mmpretrain with an average": lambda s: {"state_dict": to_mmpretrain(s), "ema_state_dict": {"steps": 1}},
    "Hugging Face": lambda s: to_huggingface(s)[1],
    "Hugging Face in Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in to_huggingface(s)[1].items()}},
    "counters among the tensors": lambda s: s | {"steps": torch.ones(1), "iteration": 3},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_logits(layout, tmp_path):
    torch.save(LAYOUTS[layout](state()), tmp_path / "x.pth")
    loaded = load_model(MODEL, tmp_path / "x.pth", fused=False)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded.model(x), network()(x))


def test_the_average_is_taken_where_it_is_asked_for(tmp_path):
    raw, average = state(), state(seed=1)
    torch.save({"model": raw, "model_ema": average}, tmp_path / "a.pth")
    both = {f"model.{k}": v for k, v in raw.items()} | {f"ema_model.{k}": v for k, v in average.items()}
    torch.save({"state_dict": both}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        assert torch.equal(read_weights(tmp_path / name).tensors["head.bias"], raw["head.bias"])
        assert torch.equal(read_weights(tmp_path / name, ema=True).tensors["head.bias"], average["head.bias"])
    torch.save({"model": raw}, tmp_path / "c.pth")
    with pytest.raises(DeitfastError, match="holds no averaged weights"):
        read_weights(tmp_path / "c.pth", ema=True)


def test_a_bare_average_is_not_taken_for_raw_weights_in_silence(tmp_path):
    torch.save(state(), tmp_path / "c.pth")
    with pytest.raises(DeitfastError, match="holds no averaged weights"):
        read_weights(tmp_path / "c.pth", ema=True)


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "two models": (lambda s: {"a": {"x": s}, "b": {"x": s}}, "holds several models: a, b"),
    "two prefixes": (lambda s: {f"{p}.{k}": v for p in "ab" for k, v in s.items()}, r"several models, under a\., b\."),
    "LoRA": (lambda s: s | {"blocks.0.attn.qkv.lora_A.weight": torch.ones(1)}, "Merge them first"),
    "no model": (lambda s: {"optimizer": {}, "epoch": 1}, "holds no state dict of tensors"),
    "rectangle": (lambda s: s | {"pos_embed": torch.zeros(1, 16, 64)}, "has 16 positions, which are not 1 of tokens"),
    "no patches": (lambda s: s | {"pos_embed": torch.zeros(1, 1, 64)}, "not 1 of tokens and a square"),
    "backbone": (lambda s: {k: v for k, v in s.items() if "head" not in k}, "a head .*--init x.pth --reset-head"),
    "pooled": (lambda s: s | {"fc_norm.weight": torch.ones(64)}, "has tensor fc_norm.weight, which the model lacks"),
    "whole model": (lambda s: torch.nn.Linear(2, 2), "holds a whole model"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_with_the_remedy(kind, tmp_path):
    make, message = REFUSED[kind]
    torch.save(make(state()), tmp_path / "x.pth")
    with pytest.raises(DeitfastError, match=message) as raised:
        load_model(MODEL, tmp_path / "x.pth")
    assert "\n" not in str(raised.value)


def test_a_distilled_file_names_the_model_that_takes_it(tmp_path):
    torch.manual_seed(0)
    distilled = create_model("deit_tiny_distilled_patch16_224", fused=False)
    torch.save(distilled.state_dict(), tmp_path / "x.pth")
    with pytest.raises(DeitfastError, match=r"Use --model deit_tiny_distilled.*or give a file without distillation"):
        load_model("deit_tiny_patch16_224", tmp_path / "x.pth")


BACKBONES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no head": lambda s: {"model": s},
    "MAE with its decoder": lambda s: {
        "model": s
        | {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.zeros(1, 17, 32)}
        | {"decoder_embed.weight": torch.zeros(32, 64), "decoder_blocks.0.norm1.weight": torch.zeros(32)}
    },
    "DINO": lambda s: {
        "student": {f"module.backbone.{k}": v + 1 for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.mlp.0.weight": torch.zeros(8, 64)},
    },
    "Hugging Face's ViTModel": lambda s: {k.removeprefix("vit."): v for k, v in s.items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_starts_with_a_new_head(kind, tmp_path):
    body = {k: v for k, v in state().items() if not k.startswith("head")}
    given = to_huggingface(state())[1] if kind.startswith("Hugging") else body
    given = {k: v for k, v in given.items() if "classifier" not in k}
    torch.save(BACKBONES[kind](given), tmp_path / "x.pth")
    model = network(classes=7, seed=5)
    load_weights(model, tmp_path / "x.pth", reset_head=True)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in body.items())
    assert not found["head.weight"].any()


# How the network is fed ----------------------------------------------------------------------------------------------


def folder(tmp_path: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    save_file(state(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path


HALF = (0.5, 0.5, 0.5)


def test_timms_config_is_read(tmp_path):
    cfg = {"input_size": [3, 32, 32], "crop_pct": 0.95, "mean": HALF, "std": HALF, "interpolation": "bilinear"}
    path = folder(tmp_path, {"architecture": "x", "pretrained_cfg": cfg, "label_names": list("abcd")})
    loaded = load_model(MODEL, path)
    assert loaded.model.image_size == 32
    assert loaded.preprocessing == Preprocessing(0.95, HALF, HALF, "bilinear")
    assert loaded.classes == tuple("abcd")


PROCESSORS = {
    "ViT": ({"size": {"height": 16, "width": 16}, "resample": 2, "image_mean": HALF, "image_std": HALF},
            Preprocessing(1.0, HALF, HALF, "bilinear", squash=True)),
    "DeiT": ({"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True,
              "resample": 3}, Preprocessing(0.8, squash=True)),
    "CLIP": ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "resample": 3,
              "image_mean": HALF, "image_std": HALF}, Preprocessing(0.8, HALF, HALF)),
    "old ViT": ({"size": 16, "do_resize": True, "resample": 2},
                Preprocessing(1.0, interpolation="bilinear", squash=True)),
    "not normalised": ({"size": {"shortest_edge": 16}, "do_normalize": False},
                       Preprocessing(1.0, (0, 0, 0), (1, 1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROCESSORS)
def test_hugging_faces_preprocessor_is_read(kind, tmp_path):
    processor, expected = PROCESSORS[kind]
    loaded = load_model(MODEL, folder(tmp_path, {"model_type": "vit"}, processor))
    assert loaded.preprocessing == expected
    assert loaded.model.image_size == 16


@pytest.mark.parametrize("kind", ["ViT", "CLIP"])
def test_predictions_are_what_transformers_own_processor_gives(kind, tmp_path):
    transformers = import_transformers()

    processor, _ = PROCESSORS[kind]
    loaded = load_model(MODEL, folder(tmp_path, {"model_type": "vit"}, processor), fused=False)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8))
    theirs = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    x = theirs(**processor)(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = loaded.model(x.float()).softmax(1).numpy()[0]
    np.testing.assert_allclose(Classifier(loaded, "cpu")(photo)["pred_scores"], expected, atol=2e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "lanczos", "bicubic"])
@pytest.mark.parametrize("squash", [False, True])
def test_evaluation_feeds_what_prediction_feeds(interpolation, squash, tmp_path):
    photos(tmp_path / "val", {"apple": "apple", "banana": "banana"})
    data = open_dataset(str(tmp_path), split="val", quiet=True).val
    wants = Preprocessing(0.8, interpolation=interpolation, squash=squash)
    loader = EvalLoader(data, 16, 0.8, 4, squash=squash, interpolation=interpolation, device="cpu", workers=1)
    (fed, _), *_ = loader
    for i in range(4):
        with Image.open(Path(data.root) / data.name(i)) as image:
            expected = centre_crop(image.convert("RGB"), 16, wants)
        assert np.abs(fed[i].numpy().astype(int) - expected).max() <= (2 if interpolation == "bicubic" else 0)


def test_an_image_of_one_row_is_evaluated_without_filling_the_memory(tmp_path):
    import resource

    photos(tmp_path / "val", {"apple": "apple", "banana": "banana"})
    Image.new("RGB", (60_000, 1), (200, 30, 30)).save(tmp_path / "val/apple/row.png")
    Image.new("RGB", (1, 60_000), (200, 30, 30)).save(tmp_path / "val/apple/column.png")
    data = open_dataset(str(tmp_path), split="val", quiet=True).val
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    images = torch.cat([x for x, _ in EvalLoader(data, 224, 0.875, 2, device="cpu", workers=1)])
    assert len(images) == 6
    assert (
        images[[i for i in range(6) if "row" in data.name(i) or "column" in data.name(i)]].float().std((1, 2)) < 1
    ).all()
    row = centre_crop(Image.new("RGB", (60_000, 1), (200, 30, 30)), 224, Preprocessing())
    assert (row == (200, 30, 30)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kilobytes"


def test_metadata_of_ours_is_read_back(tmp_path):
    metadata = {"model": MODEL, "image_size": "32", "eval_crop_ratio": "1.0", "classes": json.dumps(list("abcd"))}
    save_file(state(image_size=32), tmp_path / "x.safetensors", metadata=metadata)
    for name in (None, MODEL):
        loaded = load_model(name, tmp_path / "x.safetensors")
        assert (loaded.model.image_size, loaded.crop_ratio, loaded.classes) == (32, 1.0, tuple("abcd"))
    exported = tmp_path / "y.safetensors"
    main(["export", str(exported), "--weights", str(tmp_path / "x.safetensors"), "--format", "safetensors"])
    assert load_model(None, exported).preprocessing == loaded.preprocessing


def test_a_checkpoint_and_its_average_know_what_their_run_knows(tmp_path):
    run, names = tmp_path / "run", list("abcd")
    step = run / "ckpt/step-0000004"
    step.mkdir(parents=True)
    recipe = {"model": MODEL, "image_size": 32, "eval_crop_ratio": 1.0}
    for stem in ("model", "ema"):
        save_file(state(image_size=32), step / f"{stem}.safetensors")
    (run / "ckpt/latest").write_text(step.name)

    def check() -> None:
        for weights, ema in ((step, False), (step, True), (run, True), (step / "ema.safetensors", False)):
            loaded = load_model(None, weights, ema=ema)
            assert (loaded.name, loaded.model.image_size, loaded.crop_ratio) == (MODEL, 32, 1.0)
            assert loaded.classes == tuple(names)

    (step / "state.json").write_text(json.dumps({"step": 4, "recipe": recipe, "classes": names}))
    check()
    (step / "state.json").write_text(json.dumps({"step": 4, "recipe": recipe}))  # of a run before this was recorded
    (run / "best").mkdir()
    save_file(state(image_size=32), run / "best/model.safetensors", metadata={"classes": json.dumps(names)})
    check()


# One name for weights, and what a model remembers --------------------------------------------------------------------


def test_create_model_takes_classes_and_size_from_the_weights(tmp_path):
    metadata = {"image_size": "32", "classes": json.dumps(list("abcd"))}
    path = tmp_path / "x.safetensors"
    save_file(state(image_size=32), path, metadata=metadata)
    photo = Image.new("RGB", (50, 40), (200, 30, 30))
    for model in (
        create_model(MODEL, weights=path), create_model(MODEL, str(path)), get_model(MODEL, pretrained=str(path)),
    ):  # fmt: skip
        assert (model.num_classes, model.image_size, model.classes) == (4, 32, tuple("abcd"))
        assert inference_model(model, photo)["pred_class"] in "abcd"
    assert inference_model(path, photo)["pred_class"] == inference_model(MODEL, photo, weights=path)["pred_class"]
    assert create_model(MODEL, weights=path, reset_head=True).num_classes == 1000
    with pytest.raises(DeitfastError, match="weights and pretrained are the same"):
        create_model(MODEL, str(path), weights=path)


# Labels --------------------------------------------------------------------------------------------------------------


def scored(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        main(["test", "--model", MODEL, "--device", "cpu", *map(str, words)])
    return capsys.readouterr()


@pytest.mark.parametrize("order", [["apple", "banana", "cherry", "date"], ["date", "cherry", "apple", "banana"]])
@pytest.mark.parametrize("there", [["apple", "banana", "cherry", "date"], ["banana", "date"]])
def test_labels_follow_the_names_in_the_weights(order, there, tmp_path, capsys):
    save_file(colour_model(order), tmp_path / "x.safetensors", metadata={"classes": json.dumps(order)})
    photos(tmp_path / "d/val", {name: name for name in there})
    out, err = scored(capsys, "--weights", tmp_path / "x.safetensors", "--data", tmp_path / "d")
    assert f"top-1 100.00 %, top-5 100.00 % on {2 * len(there)} images" in out
    assert not err


def test_names_that_the_weights_do_not_know_are_refused_and_their_order_taken_when_asked(tmp_path, capsys):
    save_file(colour_model(list(COLOURS)), tmp_path / "x.safetensors", metadata={"classes": json.dumps(list(COLOURS))})
    photos(tmp_path / "d/val", {f"{i}": name for i, name in enumerate(COLOURS)})
    words = ("--weights", tmp_path / "x.safetensors", "--data", tmp_path / "d")
    _, err = scored(capsys, *words)
    assert "class '0' and 3 more" in err
    assert "none of the 4 that the weights know (apple, banana, cherry, ...)" in err
    assert "top-1 100.00 %" in scored(capsys, *words, "--classes", "folders")[0]


def test_the_order_of_numbers_is_told_where_the_weights_have_no_names(tmp_path, capsys):
    save_file(colour_model(["apple", "banana", "cherry"]), tmp_path / "x.safetensors")
    photos(tmp_path / "d/val", {"1": "apple", "2": "banana", "10": "cherry"})
    words = ("--weights", tmp_path / "x.safetensors", "--data", tmp_path / "d")
    out, err = scored(capsys, *words)
    assert "top-1 33.33 %" in out
    assert "in the order 1, 10, 2 for labels 0, 1, ...; --classes natural takes 1, 2, 10" in err
    out, err = scored(capsys, *words, "--classes", "natural")
    assert "top-1 100.00 %" in out
    assert not err


def test_hugging_faces_names_are_taken_by_their_numbers(tmp_path):
    labels = {"10": "k", **{str(i): "abcdefghij"[i] for i in reversed(range(10))}}
    save_file(state(classes=11), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": labels}))
    assert read_weights(tmp_path).classes == tuple("abcdefghijk")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"1": "a", "3": "b"}}))
    assert read_weights(tmp_path).classes is None


def test_class_names_of_other_programs_are_found(tmp_path):
    for facts in ({"class_to_idx": {"b": 1, "a": 0}}, {"classes": ["a", "b"]}, {"meta": {"CLASSES": ("a", "b")}}):
        torch.save({"model": state(classes=2), **facts}, tmp_path / "x.pth")
        assert read_weights(tmp_path / "x.pth").classes == ("a", "b")


def test_imagenets_synsets_and_words_are_the_same_classes():
    names = imagenet_names()
    found = ["n01443537", "n01440764"]
    assert labels_by_name(names, 1000, found, "d")[0] == {"n01443537": 1, "n01440764": 0}
    shuffled = tuple(reversed(names))
    assert labels_by_name(shuffled, 1000, found, "d")[0] == {"n01443537": 998, "n01440764": 999}
    labels, note = labels_by_name(None, 1000, found, "d")
    assert labels["n01440764"] == 0
    assert "ImageNet's order is taken" in note
    with pytest.raises(DeitfastError, match="no labels follow"):
        labels_by_name(None, 1000, ["cat", "dog"], "d")
    cranes = [i for i, name in enumerate(names) if name == "crane"]
    assert len(cranes) == 2
    with pytest.raises(DeitfastError, match="class 'crane' of d"):
        labels_by_name(names, 1000, ["crane"], "d")


def test_a_heads_rows_follow_the_datas_names(tmp_path):
    order = ["date", "cherry", "apple", "banana"]
    torch.save({"model": colour_model(order), "classes": order}, tmp_path / "x.pth")
    model = create_model(MODEL, weights=tmp_path / "x.pth", classes=list(COLOURS), fused=False).eval()
    assert model.classes == tuple(COLOURS)
    for name, colour in COLOURS.items():
        assert inference_model(model, Image.new("RGB", (20, 20), colour))["pred_class"] == name
    with pytest.raises(DeitfastError, match=r"its head knows the classes date, cherry, .* not the data's elm"):
        create_model(MODEL, weights=tmp_path / "x.pth", classes=["apple", "banana", "cherry", "elm"])
    assert create_model(MODEL, weights=tmp_path / "x.pth", classes=list("abcd"), reset_head=True).num_classes == 4
    assert head_order(["n01440764", "b"], ["b", "tench, Tinca tinca"], "x") == [1, 0]


def test_a_models_name_is_told_by_its_weights(tmp_path: Path) -> None:
    whole = state()
    save_file(whole, tmp_path / "w.safetensors", metadata={"classes": json.dumps(list(COLOURS))})
    for given in ({"weights": tmp_path / "w.safetensors"}, {"pretrained": str(tmp_path / "w.safetensors")}):
        model = create_model(**given, fused=False)
        assert model.classes == tuple(COLOURS)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())
    for nothing in ({}, {"pretrained": True}):
        with pytest.raises(DeitfastError, match=r"neither a model nor weights\. Give a model's name"):
            create_model(**nothing)


def test_training_knows_weights_by_the_name_of_the_other_commands() -> None:
    from deitfast import Recipe
    from deitfast.training.launch import parse_flags

    assert parse_flags(Recipe(), ["--weights", "w.pth"]) == parse_flags(Recipe(), ["--init", "w.pth"])


@pytest.fixture
def run_with_an_average(tmp_path: Path) -> Path:
    """A run's folder whose last checkpoint holds other weights than its average."""
    step = tmp_path / "run/ckpt/step-0000004"
    step.mkdir(parents=True)
    save_file(state(seed=1), step / "model.safetensors")
    save_file(state(seed=2), step / "ema.safetensors")
    (step / "state.json").write_text(json.dumps({"step": 4, "recipe": {"model": MODEL}, "classes": list("abcd")}))
    (tmp_path / "run/ckpt/latest").write_text(step.name)
    return tmp_path / "run"


def test_the_average_can_be_asked_for_wherever_weights_are_named(run_with_an_average: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for ema, seed in ((False, 1), (True, 2)):
        expected = inference_model(network(seed=seed), image, device="cpu")["pred_scores"]
        found = inference_model(run_with_an_average, image, device="cpu", ema=ema)
        assert np.array_equal(found["pred_scores"], expected)
        assert found["pred_class"] in "abcd"
        model = create_model(None, weights=run_with_an_average, ema=ema, fused=False)
        assert torch.equal(model.head.bias, network(seed=seed).head.bias)
    for call in (lambda: create_model(MODEL, ema=True), lambda: inference_model(network(), image, ema=True)):
        with pytest.raises(DeitfastError, match="ema chooses among a run's weights"):
            call()


def test_a_run_that_went_on_is_read_again(run_with_an_average: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = run_with_an_average / "ckpt/step-0000004/model.safetensors"
    before = inference_model(run_with_an_average, image, device="cpu")["pred_scores"]
    save_file(state(seed=3), file)
    os.utime(file, ns=(1, 1))  # another time than before, however coarse the clock
    after = inference_model(run_with_an_average, image, device="cpu")["pred_scores"]
    assert np.array_equal(after, inference_model(network(seed=3), image, device="cpu")["pred_scores"])
    assert not np.array_equal(after, before)


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_with_and_without_a_distillation_token_say_which_model_takes_them(distilled: bool, tmp_path) -> None:
    names = ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"]
    save_file(create_model(names[distilled], image_size=32, num_classes=4).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(DeitfastError) as refused:
        create_model(names[not distilled], weights=tmp_path / "x.safetensors", image_size=32)
    said = str(refused.value)
    assert f"holds weights of {names[distilled]}, not of {names[not distilled]}" in said
    assert f"Use --model {names[distilled]}" in said
    assert f"or give a file {'without' if distilled else 'with'} distillation token" in said


def test_no_image_size_is_zero_in_python_as_in_the_commands(tmp_path) -> None:
    save_file(state(image_size=32), tmp_path / "x.safetensors", metadata={"image_size": "32", "model": MODEL})
    for size in (0, None):
        assert create_model(MODEL, image_size=size).image_size == 16
        assert create_model(None, weights=tmp_path / "x.safetensors", image_size=size).image_size == 32
        assert load_model(None, tmp_path / "x.safetensors", image_size=size).model.image_size == 32
    with pytest.raises(DeitfastError, match="image size -16 is no multiple"):
        create_model(MODEL, image_size=-16)
