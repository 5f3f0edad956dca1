"""Weights from anywhere: names of every library both ways, nesting, folders, and files that must be refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deitfast.errors import DeitfastError
from deitfast.model.convert import layout_of, to_huggingface, to_mmpretrain, to_ours
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model, load_model
from deitfast.model.weights import load_weights, read_weights
from tests.reference import import_transformers
from tests.vit_peers import perturb

SIZES = {"width": 64, "depth": 2, "num_heads": 2, "image_size": 24, "patch_size": 8, "num_classes": 5}


def small(**options: Any) -> DeiT:
    """A tiny model whose every parameter is away from its initial value, in evaluation mode."""
    model = DeiT(**(SIZES | options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def images(batch: int = 2, size: int = 24) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


VARIETIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"distilled": True},
    "DeiT III": {"layer_scale": 0.3, "class_position": False},
}


def transformers_model(kind: str) -> Any:
    """A small model of transformers off its initial values, with its default epsilon (1e-12)."""
    transformers = import_transformers()

    config = getattr(transformers, "ViTConfig" if kind.startswith("ViT") else "DeiTConfig")(
        image_size=24, patch_size=8, hidden_size=64, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256,
        num_labels=5, id2label={i: f"kind {i}" for i in range(5)},
    )  # fmt: skip
    torch.manual_seed(0)
    return perturb(getattr(transformers, kind)(config)).eval()


@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
@pytest.mark.parametrize("naming", ["files", "modules"])
def test_hugging_face_weights_give_the_same_logits_and_go_back(kind: str, naming: str, tmp_path: Path) -> None:
    theirs = transformers_model(kind)
    theirs.save_pretrained(tmp_path)  # with the names of transformers 4, as every published file has
    if naming == "modules":
        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = small(distilled=kind.startswith("DeiT"))
    load_weights(ours, tmp_path)
    x = images()
    with torch.no_grad():
        assert_close(ours(x), theirs(x).logits)
    found, state = to_huggingface(ours.state_dict())
    assert found == kind
    if naming == "files":
        assert same(state, load_file(tmp_path / "model.safetensors"))
    assert read_weights(tmp_path).classes == tuple(f"kind {i}" for i in range(5))


@pytest.mark.parametrize("variety", VARIETIES)
def test_mmpretrain_names_round_trip(variety: str, tmp_path: Path) -> None:
    model = small(**VARIETIES[variety])
    state = to_mmpretrain(model.state_dict())
    assert layout_of(state) == "mmpretrain"
    assert same(to_ours(state), model.state_dict())
    checkpoint = {"meta": {"dataset_meta": {"classes": ["a", "b", "c", "d", "e"]}, "epoch": 300}, "state_dict": state}
    torch.save(checkpoint, tmp_path / "epoch_300.pth")
    loaded = DeiT(**(SIZES | VARIETIES[variety]))
    load_weights(loaded, tmp_path / "epoch_300.pth")
    assert same(loaded.state_dict(), model.state_dict())
    assert read_weights(tmp_path / "epoch_300.pth").classes == ("a", "b", "c", "d", "e")


# Of mmpretrain's VisionTransformer, DistilledVisionTransformer, DeiT3 and their heads (mmpretrain/models/backbones and
# heads, tools/model_converters/deit3_to_mmpretrain.py).
MMPRETRAIN_NAMES = {
    "plain": """backbone.cls_token backbone.pos_embed backbone.patch_embed.projection.weight
        backbone.patch_embed.projection.bias backbone.ln1.weight backbone.ln1.bias head.layers.head.weight
        head.layers.head.bias""",
    "distilled": "backbone.dist_token head.layers.head_dist.weight head.layers.head_dist.bias",
    "DeiT III": "backbone.layers.1.attn.gamma1.weight backbone.layers.1.ffn.gamma2.weight",
    "block": """ln1.weight ln1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias ln2.weight ln2.bias
        ffn.layers.0.0.weight ffn.layers.0.0.bias ffn.layers.1.weight ffn.layers.1.bias""",
}


@pytest.mark.parametrize("variety", VARIETIES)
def test_mmpretrain_names_are_those_of_its_modules(variety: str) -> None:
    names = MMPRETRAIN_NAMES["plain"].split()
    names += [f"backbone.layers.{i}.{name}" for i in range(2) for name in MMPRETRAIN_NAMES["block"].split()]
    if variety != "plain":
        extra = MMPRETRAIN_NAMES[variety].split()
        names += extra + [name.replace("layers.1.", "layers.0.") for name in extra if "layers.1." in name]
    assert set(to_mmpretrain(small(**VARIETIES[variety]).state_dict())) == set(names)


def test_the_authors_deit3_names_are_read() -> None:
    model = small(**VARIETIES["DeiT III"])
    theirs = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in model.state_dict().items()
    }
    assert "blocks.1.gamma_2" in theirs
    assert same(to_ours(theirs), model.state_dict())


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_raw_and_averaged_weights_of_training_programs(key: str, tmp_path: Path) -> None:
    from argparse import Namespace

    raw = create_model("deit_digits_patch4_16", num_classes=4)
    averaged = {name: tensor + 1 for name, tensor in raw.state_dict().items()}
    average = {"model": "model_ema", "state_dict": "state_dict_ema"}[key]
    saved = {
        key: {f"module._orig_mod.{name}": tensor for name, tensor in raw.state_dict().items()},
        average: averaged,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": Namespace(lr=1e-3),
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    assert same(read_weights(tmp_path / "checkpoint.pth").tensors, raw.state_dict())
    assert same(read_weights(tmp_path / "checkpoint.pth", ema=True).tensors, averaged)


def test_folders_of_our_runs(tmp_path: Path) -> None:
    states = {name: {"x": torch.full((2,), float(i))} for i, name in enumerate(["best", "model", "ema"])}
    run, step = tmp_path / "run", tmp_path / "run" / "ckpt" / "step-0000007"
    step.mkdir(parents=True)
    (run / "ckpt" / "latest").write_text("step-0000007")
    for stem in ("model", "ema"):
        save_file(states[stem], step / f"{stem}.safetensors")
    assert same(read_weights(run).tensors, states["model"])
    (run / "best").mkdir()
    save_file(states["best"], run / "best" / "model.safetensors", metadata={"model": "deit_tiny_patch16_224"})
    assert same(read_weights(run).tensors, states["best"])
    assert read_weights(run).model == "deit_tiny_patch16_224"
    assert same(read_weights(run, ema=True).tensors, states["ema"])
    assert same(read_weights(step, ema=True).tensors, states["ema"])
    assert same(read_weights(step).tensors, states["model"])
    (step / "ema.safetensors").unlink()
    with pytest.raises(DeitfastError, match="holds no averaged weights"):
        read_weights(step, ema=True)


def test_a_model_is_told_from_its_file(tmp_path: Path) -> None:
    model = create_model("deit_digits_patch4_16", num_classes=3, image_size=24)
    save_file(model.state_dict(), tmp_path / "x.bin", metadata={"classes": json.dumps(["one", "two", "three"])})
    loaded = load_model(None, tmp_path / "x.bin")
    assert (loaded.name, loaded.model.image_size, loaded.classes) == (
        "deit_digits_patch4_16", 24, ("one", "two", "three")
    )  # fmt: skip
    assert not loaded.model.training
    assert load_model("deit_digits_patch4_16", tmp_path / "x.bin").model.image_size == 16
    save_file({"weight": torch.zeros(2)}, tmp_path / "y.bin")
    with pytest.raises(DeitfastError, match="weights of no model of the list"):
        load_model(None, tmp_path / "y.bin")
    with pytest.raises(DeitfastError, match="neither a model nor weights"):
        load_model(None, None)


def test_synsets_as_class_names_are_put_into_words(tmp_path: Path) -> None:
    model = create_model("deit_digits_patch4_16", num_classes=2)
    path = tmp_path / "x.safetensors"
    save_file(model.state_dict(), path, metadata={"classes": json.dumps(["n01443537", "n02391049"])})
    assert load_model(None, path).classes == ("goldfish, Carassius auratus", "zebra")


# Refused -------------------------------------------------------------------------------------------------------------


class Malice:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


def _zip_pickle(path: Path, mark: Path) -> None:
    torch.save({"model": {"x": torch.ones(1)}, "args": Malice(mark)}, path)


def _bare_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Malice(mark)))


def _legacy_pickle(path: Path, mark: Path) -> None:
    torch.save({"model": Malice(mark)}, path, _use_new_zipfile_serialization=False)


def _whole_model(path: Path, mark: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("write", [_zip_pickle, _bare_pickle, _legacy_pickle, _whole_model])
def test_nothing_in_a_pickle_is_executed(write: Callable[[Path, Path], None], name: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    write(tmp_path / name, mark)
    with pytest.raises(DeitfastError, match=r"holds (more than tensors|a whole model)|cannot be read") as raised:
        read_weights(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)  # torch's own advice is to load it all the same
    assert not mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_truncation_is_refused_in_one_line(suffix: str, tmp_path: Path) -> None:
    state, path = {"weight": torch.arange(64.0), "bias": torch.ones(3)}, tmp_path / f"whole{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole, cut = path.read_bytes(), tmp_path / f"cut{suffix}"
    for length in range(0, len(whole) - 1, 37):
        cut.write_bytes(whole[:length])
        with pytest.raises(DeitfastError) as raised:
            read_weights(cut)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "a page of HTML"),
        (b"\x1f\x8b" + bytes(100), "compressed file. Unpack it first"),
        (b"\xff" * 64, "neither a safetensors nor a PyTorch file"),
        ((10**15).to_bytes(8, "little") + b"{}", "neither a safetensors nor a PyTorch file"),
    ],
)
def test_what_is_no_weight_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(DeitfastError, match=message):
        read_weights(tmp_path / "x.pth")
    with pytest.raises(DeitfastError, match=r"Did you mean x.pth\?"):
        read_weights(tmp_path / "y.pth")


def test_layer_scale_has_no_place_in_transformers() -> None:
    with pytest.raises(DeitfastError, match="no DeiT with LayerScale"):
        to_huggingface(small(layer_scale=0.1).state_dict())
