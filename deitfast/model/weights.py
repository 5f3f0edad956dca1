"""Weights from anywhere into a model: read without executing anything, recognised by content, refused in one line."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deitfast.errors import DeitfastError, did_you_mean, first_line
from deitfast.files import cache_folder, write_atomically
from deitfast.integrity import file_damage, pointed_to
from deitfast.model import vetting
from deitfast.model.convert import to_ours
from deitfast.model.deit import DeiT, resize_pos_embed
from deitfast.model.download import fetch, is_url
from deitfast.model.zoo import find_variant, recognise

# What training programs call the weights and their moving average: ours and timm's, DeiT's, mmpretrain's.
_RAW_KEYS = ("model", "state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")
_HEADER_LIMIT = 100_000_000  # of safetensors


@dataclass(frozen=True)
class WeightFile:
    """A weight file as read. tensors: by the names they have there, prefixes of wrappers taken off.

    model: the model's name where the file states it. classes: class names in index order where it has them. eps:
    LayerNorm's epsilon where it is stated beside the file, as Hugging Face does.
    """

    path: Path
    tensors: dict[str, Tensor]
    model: str | None = None
    classes: tuple[str, ...] | None = None
    eps: float | None = None


def load_weights(
    model: DeiT, source: str | Path, *, name: str = "", reset_head: bool = False, ema: bool = False
) -> None:
    """Fill `model` from weights, strictly, after interpolating the position embeddings to its image size.

    source, ema: see `read_weights`. name: the model's name, for the message. reset_head: leave the file's heads out and
    start the model's at zero. Raises DeitfastError naming the model the file is of, or the first missing, unexpected or
    misshapen tensor.
    """
    file = read_weights(source, ema=ema)
    fill(model, file, to_ours(file.tensors), name, reset_head)


def published_weights(name: str) -> Path:
    """Path of the published weights of `name`, downloaded once and checked against the hash in their name."""
    url = find_variant(name).url
    if not url:
        raise DeitfastError(f"no weights of {name} are published. Give a weight file, or train it")
    return fetch(url, cache_folder("weights"))


def read_state_dict(source: str | Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of `read_weights`."""
    return read_weights(source, ema=ema).tensors


def read_weights(source: str | Path, *, ema: bool = False) -> WeightFile:
    """The weights at `source`, on the CPU.

    source: a URL; a .safetensors file, or a PyTorch file of tensors; a run's folder (its best weights), a checkpoint's,
    or one of Hugging Face. The kind is told by content. A PyTorch file is unpickled with `weights_only=True`, which
    runs no code; nesting and the prefixes that DDP (`module.`) and torch.compile (`_orig_mod.`) add are taken off.
    ema: the averaged weights instead of the raw ones, where a run keeps both.
    Raises DeitfastError for what cannot be read, and for a file that is not what was written where a hash tells.
    """
    path = fetch(str(source), cache_folder("weights")) if is_url(source) else _find_file(Path(source), ema)
    kind = _kind_of(path)
    meta: Mapping[str, Any] = {}
    state: Any
    if problem := file_damage(path):
        raise DeitfastError(f"{path} is damaged: {problem}. Copy it again, or use another checkpoint")
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                vetting.check_count(path, len(file.keys()))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator itself)
        else:
            vetting.check_archive(path)
            # The authors' training program keeps its arguments beside the weights: a plain bag of values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch remarks on pickles of other versions
                state = torch.load(path, map_location="cpu", weights_only=True)
    except DeitfastError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise DeitfastError(f"{path} cannot be read as weights: {first_line(error)}") from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError and more for files with code in them
        raise DeitfastError(f"{path} holds more than tensors and is not loaded: {_what_else(error)}") from error
    if kind == "pickle" and isinstance(state, dict):
        meta = state.get("meta") if isinstance(state.get("meta"), dict) else {}  # type: ignore[assignment]
        state = _nested(path, state, ema)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DeitfastError(f"{path} holds no state dict of tensors")
    vetting.check_count(path, len(state))
    vetting.check_dense(path, state)
    if kind == "safetensors":
        vetting.check_hash(path, state, meta)
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor for name, tensor in state.items()}
    beside = _config_beside(path)
    model = meta.get("model") if kind == "safetensors" else None
    return WeightFile(path, tensors, model, _classes_in(meta, beside), beside.get("layer_norm_eps"))


def _find_file(path: Path, ema: bool) -> Path:
    """The weight file that `path`, a file or a folder, stands for."""
    path = path.expanduser()
    if path.is_dir():
        latest = pointed_to(path / "ckpt")
        if latest and (ema or not (path / "best").is_dir()):
            path = latest
        elif (path / "best").is_dir() and not ema:
            path = path / "best"
        path = path / ("ema.safetensors" if ema else "model.safetensors")
        if ema and not path.is_file():
            raise DeitfastError(f"{path.parent} holds no averaged weights. Leave --ema (ema=True) out")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DeitfastError(f"no weight file {path}.{did_you_mean(path.name, siblings)}")
    return path


def _kind_of(path: Path) -> str:
    """`safetensors` or `pickle`, by the first bytes; DeitfastError for everything else."""
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except OSError as error:
        raise DeitfastError(f"{path} cannot be read as weights: {error.strerror or error}") from error
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _HEADER_LIMIT:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "pickle"
    if head.lstrip().startswith(b"<"):
        what = "a page of HTML. Download the file itself"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        what = "a compressed file. Unpack it first"
    else:
        what = "neither a safetensors nor a PyTorch file" if head else "empty"
    raise DeitfastError(f"{path} cannot be read as weights: it is {what}")


def _nested(path: Path, state: dict[Any, Any], ema: bool) -> Any:
    """The state dict inside what a training program saved."""
    for key in _EMA_KEYS if ema else _RAW_KEYS:
        if isinstance(state.get(key), dict):
            inner = {name: value for name, value in state[key].items() if name != "steps"}  # mmengine counts there
            return inner
    if ema:
        raise DeitfastError(f"{path} holds no averaged weights. Leave --ema (ema=True) out")
    return state


def _config_beside(path: Path) -> dict[str, Any]:
    """Hugging Face's config.json beside the file; empty where there is none."""
    try:
        config = json.loads((path.parent / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and "model_type" in config else {}


def _classes_in(meta: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in safetensors metadata (a JSON list), in mmpretrain's meta or in Hugging Face's config."""
    nested = meta.get("dataset_meta")
    found: Any = (
        meta.get("classes") or meta.get("CLASSES") or (nested.get("classes") if isinstance(nested, dict) else None)
    )
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    labels = config.get("id2label")
    if not found and isinstance(labels, dict) and not all(str(v).startswith("LABEL_") for v in labels.values()):
        numbered = all(str(key).isdecimal() for key in labels)
        found = [labels[key] for key in sorted(labels, key=int)] if numbered else None
    return tuple(map(str, found)) if isinstance(found, (list, tuple)) and found else None


def fill(model: DeiT, file: WeightFile, state: dict[str, Tensor], name: str, reset_head: bool = False) -> None:
    ours = model.state_dict()
    if _architecture(state) != _architecture(ours):
        found = recognise(shapes_of(state))
        what = f"of {found}" if found else "of another model"
        raise DeitfastError(f"{file.path} holds weights {what}, not of {name or 'this model'}. {_remedy(found, model)}")
    if reset_head:
        for head, linear in model.heads():
            state[f"{head}.weight"] = torch.zeros_like(linear.weight)
            state[f"{head}.bias"] = torch.zeros_like(linear.bias)
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        state["pos_embed"] = resize_pos_embed(
            state["pos_embed"], model.patch_embed.num_patches, model.num_prefix_positions
        )
    _check_tensors(file.path, state, ours)
    vetting.check_numbers(file.path, state)
    model.load_state_dict(state)
    if file.eps is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = file.eps


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def layer_scale_of(shapes: Mapping[str, tuple[int, ...]]) -> float | None:
    """An initial LayerScale for a model that such tensors fill; None leaves the choice to its name."""
    return 1.0 if "blocks.0.ls1.gamma" in shapes else None


def _architecture(state: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What must agree before single tensors are worth naming: width, patch size, depth, distillation, LayerScale."""
    patch = state.get("patch_embed.proj.weight")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.") and key.endswith("norm1.weight")})
    shape = None if patch is None else tuple(patch.shape)
    return shape, depth, "dist_token" in state, "blocks.0.ls1.gamma" in state


def _remedy(found: str | None, model: DeiT) -> str:
    if found:
        return f"Create that model, or give a file of width {model.width} and depth {len(model.blocks)}"
    return "Names must be timm's (patch_embed.proj.weight, ...), Hugging Face's or mmpretrain's"


def _check_tensors(path: Path, state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    missing = [key for key in ours if key not in state]
    extra = [key for key in state if key not in ours]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DeitfastError(f"{path} lacks tensor {missing[0]}{more}.{did_you_mean(missing[0], extra)}")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise DeitfastError(f"{path} has tensor {extra[0]}{more}, which the model lacks.{did_you_mean(extra[0], ours)}")
    for key, tensor in ours.items():
        if state[key].shape == tensor.shape:
            continue
        if key.startswith("head") and state[key].ndim == tensor.ndim:
            raise DeitfastError(
                f"{path}: the head has {state[key].shape[0]} classes, the data {tensor.shape[0]}. "
                "Add --reset-head (reset_head=True) to start a new head"
            )
        raise DeitfastError(f"{path}: {key} has shape {tuple(state[key].shape)}, the model's is {tuple(tensor.shape)}")


def _what_else(error: Exception) -> str:
    """What a refused pickle asked for. torch's own first line recommends to load it all the same."""
    found = re.search(r"GLOBAL (\S+)|(?:class|type|function) (\S+)", str(error))
    return next(filter(None, found.groups())) if found else type(error).__name__


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Weights alone, atomically, as one safetensors file that states the hash of its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    stated = {**metadata, vetting.HASH: vetting.content_hash(contiguous, metadata)}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=stated))
