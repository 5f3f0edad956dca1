"""Weight files that lie about their size, are damaged, or hold no numbers: refused in one line, nothing executed."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deitfast.data.manifest import _OpenFile
from deitfast.errors import DeitfastError
from deitfast.integrity import damage, pointed_to, write_hashes
from deitfast.model.deit import DeiT
from deitfast.model.factory import load_model
from deitfast.model.weights import load_weights, read_weights, save_weights

FILES = (("plain.pth", "r"), ("bomb.pth", "w"))
SMALL = {"width": 64, "depth": 1, "num_heads": 2, "image_size": 8, "patch_size": 8, "num_classes": 3}


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in DeiT(**SMALL).state_dict().items()}


def one_line(error: pytest.ExceptionInfo[DeitfastError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_no_flipped_bit_of_saved_weights_changes_what_is_loaded(tmp_path: Path) -> None:
    path, tensors = tmp_path / "best" / "model.safetensors", state()
    save_weights(path, tensors, {"model": "x", "classes": json.dumps(["a", "b", "c"])})
    whole, chooser, refused = path.read_bytes(), random.Random(0), 0
    header = int.from_bytes(whole[:8], "little") + 8
    for trial in range(60):
        flip(path, chooser.randrange(8 * (header if trial < 30 else len(whole))))
        try:
            file = read_weights(path)
        except DeitfastError:
            refused += 1
        else:  # such as a flip in the name of the hash itself: nothing that is used has changed
            assert file.tensors.keys() == tensors.keys()
            assert all(torch.equal(file.tensors[name], tensor) for name, tensor in tensors.items())
            assert file.classes == ("a", "b", "c")
        path.write_bytes(whole)
    assert refused > 50
    assert read_weights(path).classes == ("a", "b", "c")


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_is_compared_with_its_manifest_when_its_weights_are_used(tmp_path: Path, ema: bool) -> None:
    folder = tmp_path / "ckpt" / "step-0000007"
    folder.mkdir(parents=True)
    for name in ("model", "ema"):
        save_file(state(), folder / f"{name}.safetensors")
    write_hashes(folder)
    assert read_weights(tmp_path, ema=ema).path.parent == folder  # `latest` is missing: the only one there is
    for pointer in (b"", b"step-0000009", b"\xff\xfe", b"x" * 5000, b"../../etc"):
        (tmp_path / "ckpt" / "latest").write_bytes(pointer)
        assert pointed_to(tmp_path / "ckpt") == folder
    flip(folder / ("ema.safetensors" if ema else "model.safetensors"), 80_000)
    assert damage(folder)
    with pytest.raises(DeitfastError, match=r"is damaged: .*\.safetensors sha256 mismatch") as error:
        read_weights(tmp_path, ema=ema)
    one_line(error)


@pytest.mark.parametrize(
    "name",
    ["layers.1000000000.ln1.weight", "backbone.layers.9999.ln1.weight", "deit.encoder.layer.123456789012345.x.weight"],
)
def test_a_number_in_a_name_sizes_nothing(tmp_path: Path, name: str) -> None:
    own = "embeddings.patch_embeddings.projection" if name.startswith("deit") else "patch_embed.projection"
    root = "deit." if name.startswith("deit") else "backbone."
    save_file({f"{root}{own}.weight": torch.zeros(4, 3, 8, 8), name: torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(DeitfastError, match="no vision transformer has 1000 blocks") as error:
        load_model("deit_tiny_patch16_224", tmp_path / "w.safetensors")
    one_line(error)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t * float("nan"), "are NaN or infinite"),
        (lambda t: t.to(torch.int64), "is torch.int64, weights must be floating-point"),
        (lambda t: t.to(torch.complex64), "is torch.complex64, weights must be floating-point"),
        (lambda t: t.to_sparse(), "is sparse or nested"),
        (lambda t: t.to("meta"), "is without values"),
        (lambda t: t.sum(), r"head.weight has shape \(\)"),
        (lambda t: t[0], r"head.weight has shape \(64,\)"),
    ],
    ids=["nan", "int64", "complex", "sparse", "meta", "scalar", "vector"],
)
def test_what_is_no_plain_finite_matrix_is_refused(tmp_path: Path, spoil, message: str) -> None:
    tensors = state()
    tensors["head.weight"] = spoil(tensors["head.weight"])
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(DeitfastError, match=message) as error:
        load_weights(DeiT(**SMALL), tmp_path / "w.pth")
    one_line(error)


def test_half_precision_weights_are_numbers_too(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_file({name: t.to(dtype) for name, t in state().items()}, tmp_path / "w.safetensors")
        load_weights(DeiT(**SMALL), tmp_path / "w.safetensors")


def test_a_file_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "plain.pth")
    plain, bomb = (zipfile.ZipFile(tmp_path / name, mode, zipfile.ZIP_DEFLATED) for name, mode in FILES)
    with plain, bomb:
        for name in plain.namelist():
            data = plain.read(name)
            bomb.writestr(name, pickle.dumps({}) + bytes(1 << 22) if name.endswith("data.pkl") else data)
    with pytest.raises(DeitfastError, match="would unpack to more than its") as error:
        read_weights(tmp_path / "bomb.pth")
    one_line(error)
    read_weights(tmp_path / "plain.pth")


def test_more_tensors_than_a_model_has_are_not_read(tmp_path: Path) -> None:
    save_file({f"t{i}": torch.zeros(0) for i in range(40_001)}, tmp_path / "w.safetensors")
    with pytest.raises(DeitfastError, match="holds 40,001 tensors"):
        read_weights(tmp_path / "w.safetensors")


def test_json_nested_too_deep_is_no_list_of_names(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "model.safetensors", metadata={"classes": "[" * 100_000})
    (tmp_path / "config.json").write_text('{"model_type": "vit", "id2label": ' + "[" * 100_000)
    assert read_weights(tmp_path / "model.safetensors").classes is None
    (tmp_path / "config.json").write_text('{"model_type": "vit", "id2label": {"first": "cat"}}')
    assert read_weights(tmp_path / "model.safetensors").classes is None


def test_a_read_asks_for_no_more_memory_than_the_file_has_bytes(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"0123456789")
    file = _OpenFile(str(tmp_path / "image"))
    assert file.read(2, 1 << 40).tobytes() == b"23456789"
    assert not len(file.read(1 << 62, 1 << 40))
