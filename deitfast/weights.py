"""Weights from files into a model: read without executing anything, matched by content, refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deitfast.errors import DeitfastError, did_you_mean
from deitfast.model import DeiT, resize_pos_embed
from deitfast.zoo import find_variant, recognise


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, a run's checkpoint folder, or a .pth of tensors only; on the CPU.

    A `.pth` is unpickled with `weights_only=True`; the nesting under "model" or "state_dict" and the prefixes that
    DDP (`module.`) and torch.compile (`_orig_mod.`) add are taken off.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DeitfastError(f"no weight file {path}.{did_you_mean(path.name, siblings)}")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise DeitfastError(f"{path} cannot be read as weights: {_first_line(error)}") from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError and more for files with code in them
        raise DeitfastError(f"{path} holds more than tensors and is not loaded: {_first_line(error)}") from error
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()) or not state:
        raise DeitfastError(f"{path} holds no state dict of tensors")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def load_weights(model: DeiT, path: str | Path, *, name: str = "", reset_head: bool = False) -> None:
    """Fill `model` from a weight file, strictly, after interpolating the position embeddings to its image size.

    name: the model's name, for the message. reset_head: leave the file's heads out and start the model's at zero.
    Raises DeitfastError naming the model the file is of, or the first missing, unexpected or misshapen tensor.
    """
    state = read_state_dict(path)
    found = recognise({key: tuple(tensor.shape) for key, tensor in state.items()})
    ours = model.state_dict()
    if _architecture(state) != _architecture(ours):
        what = f"of {found}" if found else "of another model"
        raise DeitfastError(f"{path} holds weights {what}, not of {name or 'this model'}. {_remedy(found, model)}")
    if reset_head:
        for head, linear in model.heads():
            state[f"{head}.weight"] = torch.zeros_like(linear.weight)
            state[f"{head}.bias"] = torch.zeros_like(linear.bias)
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        state["pos_embed"] = resize_pos_embed(
            state["pos_embed"], model.patch_embed.num_patches, model.num_prefix_tokens
        )
    _check_tensors(path, state, ours)
    model.load_state_dict(state)


def published_weights(name: str) -> Path:
    """Path of the authors' weights of `name`, downloaded once and checked against the hash in their name."""
    url = find_variant(name).url
    if not url:
        raise DeitfastError(f"no weights of {name} are published. Give pretrained=PATH, or train it")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "deitfast" / "weights"
    target = cache / url.rsplit("/", 1)[1]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        digest = target.stem.rsplit("-", 1)[1]
        try:
            torch.hub.download_url_to_file(url, str(target), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise DeitfastError(
                f"could not fetch {url} ({_first_line(error)}). Download it elsewhere and give its path"
            ) from error
    return target


def _architecture(state: dict[str, Tensor]) -> tuple[Any, ...]:
    """What must agree before single tensors are worth naming: width, patch size, depth, distillation, LayerScale."""
    patch = state.get("patch_embed.proj.weight")
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.") and key.endswith("norm1.weight")})
    return None if patch is None else tuple(patch.shape), depth, "dist_token" in state


def _remedy(found: str | None, model: DeiT) -> str:
    if found:
        return f"Create that model, or give a file of width {model.width} and depth {len(model.blocks)}"
    return "Its tensors must carry timm's names (patch_embed.proj.weight, blocks.0.norm1.weight, ...)"


def _check_tensors(path: str | Path, state: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
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
        if key.startswith("head"):
            raise DeitfastError(
                f"{path}: the head has {state[key].shape[0]} classes, the data {tensor.shape[0]}. "
                "Add --reset-head (reset_head=True) to start a new head"
            )
        raise DeitfastError(f"{path}: {key} has shape {tuple(state[key].shape)}, the model's is {tuple(tensor.shape)}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
