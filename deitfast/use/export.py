"""A model out of here: files of timm, Hugging Face and mmpretrain, plain safetensors, ONNX, and torch.export programs.

Weights are written as they are, so every one of these that holds a state dict loads back exactly. ONNX files and
exported programs take normalised images, fp32 (batch, 3, S, S) with any batch, and give logits (batch, classes); what
the input must be lies in their metadata.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deitfast.errors import DeitfastError
from deitfast.files import write_atomically
from deitfast.model.convert import to_huggingface, to_mmpretrain
from deitfast.model.deit import Block, DeiT
from deitfast.model.factory import LoadedModel
from deitfast.model.weights import save_weights

FORMATS = {
    "timm": ".safetensors",
    "safetensors": ".safetensors",
    "mmpretrain": ".pth",
    "hf": "",
    "onnx": ".onnx",
    "exported": ".pt2",
}
"""Format -> suffix of its file; Hugging Face's is a folder."""
_ONNX_PARAMETERS = (1 << 31) // 4 - (1 << 20)


def export(loaded: LoadedModel, format: str, path: str | Path, *, force: bool = False) -> Path:
    """Write the model at `path` (whole, or not at all) and return it. Raises DeitfastError for what cannot be written.

    format: `timm` and `safetensors` (timm's names; the latter also states the model's and its classes' names), `hf` (a
    folder for from_pretrained), `mmpretrain`, `onnx` (wants the extra deitfast[onnx]), `exported` (torch.export).
    force: replace what is at `path`, a file, or a folder that holds such an export.
    """
    if format not in FORMATS:
        raise DeitfastError(f"format {format!r} unknown. Use {', '.join(FORMATS)}")
    path = Path(path)
    if path.suffix != FORMATS[format] and FORMATS[format] and not path.suffix:
        path = path.with_name(path.name + FORMATS[format])
    if path.exists() and not force:
        raise DeitfastError(f"{path} exists. Give a new name, or --force (force=True) to replace it")
    if path.is_dir() and not (format == "hf" and (path / "config.json").is_file()):
        raise DeitfastError(f"{path} is a folder, and no exported model. Give a new name")
    if format == "hf" and path.is_file():
        raise DeitfastError(f"{path} is a file, and Hugging Face's format a folder. Give a new name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(loaded, format, path)
    except OSError as error:
        raise DeitfastError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _write(loaded: LoadedModel, format: str, path: Path) -> None:
    state = {name: tensor.detach().cpu() for name, tensor in loaded.model.state_dict().items()}
    if format == "timm":
        save_weights(path, state, {"format": "pt"})
    elif format == "safetensors":
        save_weights(path, state, {"format": "pt", **_facts(loaded)})
    elif format == "mmpretrain":
        meta = {"dataset_meta": {"classes": list(loaded.classes)}}
        contents = {"meta": meta, "state_dict": to_mmpretrain(state)}
        write_atomically(path, lambda temporary: torch.save(contents, temporary))
    elif format == "hf":
        _write_huggingface(loaded, state, path)
    elif format == "onnx":
        write_atomically(path, lambda temporary: _write_onnx(loaded, temporary))
    else:
        program, facts = exported_program(loaded.model), _facts(loaded)
        write_atomically(path, lambda temporary: _save_program(program, temporary, facts))


def _facts(loaded: LoadedModel) -> dict[str, str]:
    """What a user of the file needs to know, as strings."""
    wants = loaded.preprocessing
    return {
        "model": loaded.name,
        "classes": json.dumps(list(loaded.classes)),
        "image_size": str(loaded.model.image_size),
        "crop_ratio": str(wants.crop_ratio),
        "mean": json.dumps(wants.mean),
        "std": json.dumps(wants.std),
        "interpolation": wants.interpolation,
        "squash": json.dumps(wants.squash),
    }


def _write_huggingface(loaded: LoadedModel, state: dict[str, Tensor], path: Path) -> None:
    """A folder of config.json, preprocessor_config.json and model.safetensors, in the place of one that is there."""
    kind, tensors = to_huggingface(state)
    block: Any = loaded.model.blocks[0]
    size, wants = loaded.model.image_size, loaded.preprocessing
    resized = int(size / wants.crop_ratio)
    config = {
        "architectures": [kind],
        "model_type": "vit" if kind.startswith("ViT") else "deit",
        "hidden_size": loaded.model.width,
        "num_hidden_layers": len(loaded.model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": block.norm1.eps,
        "image_size": size,
        "patch_size": loaded.model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": dict(enumerate(loaded.classes)),
        "label2id": {name: i for i, name in enumerate(loaded.classes)},
    }
    processor = {
        "image_processor_type": "CLIPImageProcessor",  # the one of them that resizes the short side and crops
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resized, "width": resized} if wants.squash else {"shortest_edge": resized},
        "resample": {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}[wants.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": wants.mean,
        "image_std": wants.std,
    }
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=1))
        (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
        save_weights(temporary / "model.safetensors", tensors, {"format": "pt"})
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plain(model: DeiT) -> DeiT:
    """A copy on the CPU in fp32 and evaluation mode whose blocks are eager PyTorch: what any other runtime knows."""
    model = copy.deepcopy(model).cpu().float().eval()
    block: nn.Module
    for block in model.blocks:
        block.__class__ = Block
    return model


def exported_program(model: DeiT) -> torch.export.ExportedProgram:
    """The forward pass as a torch.export program: fp32 (batch, 3, S, S) to logits, for any batch of at least 1."""
    model = plain(model)
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)


def _save_program(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    # torch.export.save wants a name that ends in .pt2.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "program.pt2"
        torch.export.save(program, whole, extra_files={"deitfast.json": json.dumps(facts)})
        os.replace(whole, path)


def _write_onnx(loaded: LoadedModel, path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeitfastError(f"ONNX export needs {' and '.join(missing)}: pip install 'deitfast[onnx]'")
    if sum(p.numel() for p in loaded.model.parameters()) > _ONNX_PARAMETERS:
        raise DeitfastError(f"{loaded.name} is larger than the 2 GiB of one ONNX file. Use the format exported")
    import onnx

    model = plain(loaded.model)
    example = torch.zeros(2, 3, model.image_size, model.image_size)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _facts(loaded))
    onnx.save_model(proto, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' remarks about their own insides off the screen."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
