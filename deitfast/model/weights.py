"""Weights from anywhere into a model: read without executing anything, recognised by content, refused in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deitfast.errors import DeitfastError, did_you_mean, first_line
from deitfast.files import cache_folder, read_json, write_atomically
from deitfast.integrity import file_damage, pointed_to
from deitfast.model import unpickling, vetting
from deitfast.model.class_names import head_order
from deitfast.model.convert import to_ours
from deitfast.model.deit import DeiT, resize_pos_embed
from deitfast.model.download import fetch, is_url
from deitfast.model.preprocessing import stated_beside, stated_in_metadata
from deitfast.model.state_dicts import find_state
from deitfast.model.zoo import architecture, find_variant, recognise

_HEADER_LIMIT = 100_000_000  # of safetensors


@dataclass(frozen=True)
class WeightFile:
    """A weight file as read. tensors: by timm's names, prefixes of wrappers taken off.

    model: the model's name where the file states it. classes: class names in index order where it has them. eps:
    LayerNorm's epsilon where it is stated beside the file, as Hugging Face does. stated: image_size and what of
    `Preprocessing` the file, or one beside it, says.
    """

    path: Path
    tensors: dict[str, Tensor]
    model: str | None = None
    classes: tuple[str, ...] | None = None
    eps: float | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, but of scalars, which tell nothing."""
        return _shapes(self.tensors)

    def told_model(self) -> str:
        """The name of the model that this is of: as it states, or by its shapes. Raises DeitfastError where neither."""
        name = self.model or recognise(self.shapes)
        if name is None:
            raise DeitfastError(f"{self.path} holds weights of no model of the list. Give the model's name")
        return name


def load_weights(
    model: DeiT,
    source: str | Path,
    *,
    name: str = "",
    reset_head: bool = False,
    ema: bool = False,
    classes: Sequence[str] | None = None,
) -> None:
    """Fill `model` from weights, strictly, after interpolating the position embeddings to its image size.

    source, ema: see `read_weights`. name: the model's name, for the message. reset_head: leave the file's heads out and
    start the model's at zero. classes: the data's, to which the head's rows are brought by name where the file names
    its own. Raises DeitfastError naming the model the file is of, or the first missing, unexpected or
    misshapen tensor.
    """
    fill(model, read_weights(source, ema=ema), name, reset_head, classes)


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

    source: a URL; a .safetensors file, or a PyTorch file; a run's folder (its best weights), a checkpoint's, or one of
    Hugging Face. The kind is told by content. Of a PyTorch file nothing is executed (`unpickling`); in what it holds
    the state dict is found, and prefixes of wrappers taken off (`state_dicts`).
    ema: the averaged weights instead of the raw ones, where a run keeps both.
    Raises DeitfastError for what cannot be read, and for a file that is not what was written where a hash tells.
    """
    path = fetch(str(source), cache_folder("weights")) if is_url(source) else find_weight_file(Path(source), ema)
    kind = _kind_of(path)
    meta: Mapping[str, Any] = {}
    found: Any
    if problem := file_damage(path):
        raise DeitfastError(f"{path} is damaged: {problem}. Copy it again, or use another checkpoint")
    try:
        if kind == "safetensors":
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                vetting.check_count(path, len(file.keys()))
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator itself)
        else:
            vetting.check_archive(path)
            found = unpickling.load(path)
    except DeitfastError:
        raise
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise DeitfastError(f"{path} cannot be read as weights: {first_line(error)}") from error
    except Exception as error:  # torch.load raises pickle.UnpicklingError and more for files with code in them
        what = unpickling.refused_name(error) or type(error).__name__
        raise DeitfastError(
            f"{path} holds more than tensors and is not loaded: {what}. Where you trust it, save its tensors alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(found, unpickling.StandIn):
        raise DeitfastError(
            f"{path} holds a whole model, which is code. Save its tensors: torch.save(m.state_dict(), F)"
        )
    if kind == "pickle" and isinstance(found, dict):
        meta = _facts_of_pickle(found)
    state = find_state(path, found, ema and kind == "pickle")
    vetting.check_count(path, len(state))
    vetting.check_dense(path, state)
    if kind == "safetensors":
        vetting.check_hash(path, found, meta)
    config, ours = _config_beside(path), meta if kind == "safetensors" else {}
    run_model, run_classes, run_stated = _known_to_run(path)
    stated = {**stated_beside(path.parent), **run_stated, **stated_in_metadata(ours)}
    classes = _classes_in(meta, config) or run_classes
    return WeightFile(
        path, to_ours(state), ours.get("model") or run_model, classes, config.get("layer_norm_eps"), stated
    )


def _known_to_run(path: Path) -> tuple[str | None, tuple[str, ...] | None, dict[str, Any]]:
    """Model, classes and what is stated of a checkpoint's files (RUN/ckpt/step-N), which know nothing themselves: from
    its state and the run's best weights."""
    state = read_json(path.parent / "state.json")
    recipe = state.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), str):
        return None, None, {}
    best: Mapping[str, Any] = {}
    try:
        with safe_open(path.parent.parent.parent / "best" / "model.safetensors", framework="pt") as file:
            best = file.metadata() or {}
    except (SafetensorError, OSError):
        pass  # a run without an evaluation yet
    stated = stated_in_metadata(best)
    if isinstance(recipe.get("eval_crop_ratio"), (int, float)):
        stated["crop_ratio"] = float(recipe["eval_crop_ratio"])
    if isinstance(recipe.get("image_size"), int) and recipe["image_size"]:
        stated["image_size"] = recipe["image_size"]
    return recipe["model"], _classes_in(state, {}) or _classes_in(best, {}), stated


def _facts_of_pickle(found: Mapping[Any, Any]) -> dict[str, Any]:
    """Class names in what a training program saved: mmpretrain's meta, or a list or a dict of its own."""
    meta = found.get("meta")
    facts = dict(meta) if isinstance(meta, Mapping) else {}
    for key in ("classes", "class_names", "label_names", "CLASSES"):
        if isinstance(found.get(key), (list, tuple)) and all(isinstance(name, str) for name in found[key]):
            facts.setdefault("classes", list(found[key]))
    numbers = found.get("class_to_idx")  # torchvision's ImageFolder
    if isinstance(numbers, Mapping) and sorted(map(str, numbers.values())) == sorted(map(str, range(len(numbers)))):
        facts.setdefault("classes", [str(name) for name in sorted(numbers, key=lambda name: int(numbers[name]))])
    return facts


def find_weight_file(path: Path, ema: bool) -> Path:
    """The weight file that `path`, a file or a folder, stands for."""
    path = path.expanduser()
    if path.is_dir():
        latest, best = pointed_to(path / "ckpt"), path / "best"
        folder = best if best.is_dir() and not ema else latest or path
        names = ["ema.safetensors"] if ema else ["model.safetensors", "pytorch_model.bin"]  # Hugging Face's older files
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        if ema and not path.is_file():
            raise DeitfastError(f"{folder} holds no averaged weights. Leave --ema (ema=True) out")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or " Give a .safetensors or .pth file, or a run's folder"
        raise DeitfastError(f"no weight file {path}.{hint}")
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


def _config_beside(path: Path) -> dict[str, Any]:
    """Hugging Face's or timm's config.json beside the file; empty where there is none."""
    config = read_json(path.parent / "config.json")
    return config if "model_type" in config or "architecture" in config else {}


def _classes_in(meta: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in safetensors metadata (a JSON list), in mmpretrain's meta, in timm's or Hugging Face's config."""
    nested = meta.get("dataset_meta")
    found: Any = (
        meta.get("classes") or meta.get("CLASSES") or (nested.get("classes") if isinstance(nested, dict) else None)
    )
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    found = found or config.get("label_names")  # timm's
    labels = config.get("id2label")
    if not found and isinstance(labels, dict) and not all(str(v).startswith("LABEL_") for v in labels.values()):
        numbered = sorted(labels, key=str) == sorted(map(str, range(len(labels))))
        found = [labels[str(i)] for i in range(len(labels))] if numbered else None
    return tuple(map(str, found)) if isinstance(found, (list, tuple)) and found else None


def fill(
    model: DeiT, file: WeightFile, name: str, reset_head: bool = False, classes: Sequence[str] | None = None
) -> None:
    """`load_weights` of a file that has been read."""
    state, ours = dict(file.tensors), model.state_dict()
    if architecture(file.shapes) != architecture(_shapes(ours)):
        found = recognise(file.shapes)
        what = f"of {found}" if found else "of another model"
        remedy = _remedy(found, model, state)
        raise DeitfastError(f"{file.path} holds weights {what}, not of {name or 'this model'}. {remedy}")
    if reset_head:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head")}
        for head, linear in model.heads():
            state[f"{head}.weight"] = torch.zeros_like(linear.weight)
            state[f"{head}.bias"] = torch.zeros_like(linear.bias)
    elif classes is not None and file.classes is not None and len(file.classes) == len(classes) == model.num_classes:
        order = torch.tensor(head_order(file.classes, classes, str(file.path)))
        state |= {key: state[key][order] for key in state if key.startswith("head") and state[key].ndim}
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        _check_grid(file.path, state["pos_embed"].shape[1], model.num_prefix_positions)
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
    model.stated = dict(file.stated)
    model.classes = None
    if not reset_head and file.classes is not None and len(file.classes) == model.num_classes:
        model.classes = tuple(classes or file.classes)


def _check_grid(path: Path, positions: int, prefix: int) -> None:
    """DeitfastError for positions that are not those of `prefix` tokens and a square of patches."""
    grid = positions - prefix
    if grid < 1 or math.isqrt(grid) ** 2 != grid:
        beside = f"{prefix} of tokens and " if prefix else ""
        raise DeitfastError(
            f"{path}: pos_embed has {positions} positions, which are not {beside}a square of patches. Only square "
            "images are supported"
        )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.ndim}


def _remedy(found: str | None, model: DeiT, state: Mapping[str, Tensor]) -> str:
    if not found:
        return "Names must be timm's (patch_embed.proj.weight, ...), Hugging Face's or mmpretrain's"
    if ("dist_token" in state) != model.distilled:
        without = "without" if model.distilled is False else "with"
        return f"Use --model {found} (create_model({found!r})), or give a file {without} distillation token"
    return f"Use --model {found}, or give a file of width {model.width} and depth {len(model.blocks)}"


def _check_tensors(path: Path, state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    missing = [key for key in ours if key not in state]
    extra = [key for key in state if key not in ours]
    if missing and all(key.startswith("head") for key in missing):
        raise DeitfastError(
            f"{path} is a backbone without a head ({missing[0]}). Fine-tune it with a new one: --init {path.name} "
            "--reset-head (reset_head=True)"
        )
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
                f"{path}: the head has {state[key].shape[0]} classes, {tensor.shape[0]} are wanted. Add --reset-head "
                f"(reset_head=True) to start a new head, or use num_classes={state[key].shape[0]}"
            )
        raise DeitfastError(f"{path}: {key} has shape {tuple(state[key].shape)}, the model's is {tuple(tensor.shape)}")


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Weights alone, atomically, as one safetensors file that states the hash of its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    stated = {**metadata, vetting.HASH: vetting.content_hash(contiguous, metadata)}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=stated))
