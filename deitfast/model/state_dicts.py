"""The state dict of a vision transformer inside what a training program saved, by the content and not by the program.

Programs differ in the key under which they keep it, in what else lies there, and in the prefix that a wrapper puts
before every name (`module.`, `model.`, `backbone.`, ...). The patch embedding gives both away: every layout names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deitfast.errors import DeitfastError

# What training programs call the weights and their moving average: ours and timm's, DeiT's, mmpretrain's; Lightning's,
# MAE's and DeepSpeed's; the two networks of self-distillation, of which the teacher is what DINO's authors publish.
_RAW_KEYS = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "weights", "params",
    "teacher", "student", "backbone", "encoder",
)  # fmt: skip
_EMA_KEYS = (
    "model_ema", "state_dict_ema", "ema_state_dict", "ema", "ema_model", "model_ema_state_dict", "teacher",
)  # fmt: skip
_PATCHES = re.compile(
    r"(?P<prefix>.*?)(?P<root>(?:vit\.|deit\.|backbone\.)?)"
    r"(?:patch_embed\.(?:proj|projection)|embeddings\.patch_embeddings\.projection)\.weight"
)
_AVERAGED = re.compile(r"ema|teacher|momentum|averaged|target")
_PRETEXT = re.compile(r"(mask_token|decoder\w*)(\.|$)")
"""Tensors of masked pretraining that no classifier has."""


def find_state(path: Path, found: Any, ema: bool) -> dict[str, Tensor]:
    """The state dict in `found`, what was read from the file at `path`. ema: the averaged weights.

    Raises DeitfastError where there is none, or where several are and none of them is the obvious one.
    """
    keys = _EMA_KEYS if ema else _RAW_KEYS
    averaged = not ema
    for _ in range(4):
        if not isinstance(found, Mapping):
            break
        named = next((found[key] for key in keys if isinstance(found.get(key), Mapping)), None)
        if named is not None:
            found, averaged = named, True
        elif _tensors(found):
            break
        else:
            inner = {key: value for key, value in found.items() if isinstance(value, Mapping) and _has_patches(value)}
            if len(inner) > 1:
                raise DeitfastError(
                    f"{path} holds several models: {', '.join(map(str, inner))}. Save one of them alone"
                )
            if not inner:
                break
            found = next(iter(inner.values()))
    state = _tensors(found) if isinstance(found, Mapping) else {}
    if ema and not (averaged and state) and not any(_AVERAGED.search(name) for name in state):
        raise DeitfastError(f"{path} holds no averaged weights. Leave --ema (ema=True) out")
    if not state:
        raise DeitfastError(f"{path} holds no state dict of tensors. Save one: torch.save(model.state_dict(), FILE)")
    return _without_prefix(path, state, ema)


def _tensors(found: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict; counters that lie among them (mmengine's `steps`) left out."""
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor) and name != "steps"}


def _has_patches(found: Mapping[Any, Any]) -> bool:
    return any(_PATCHES.fullmatch(str(name)) for name in found) or any(
        isinstance(value, Mapping) and _has_patches(value) for value in found.values()
    )


def _without_prefix(path: Path, state: dict[str, Tensor], ema: bool) -> dict[str, Tensor]:
    """Names as their layout has them. What lies outside the prefix (a loss, a projector) belongs to training."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()}
    if any("lora_" in name for name in state):
        raise DeitfastError(f"{path} holds LoRA adapters. Merge them first: model.merge_and_unload(), then save that")
    prefix = _prefix(path, state, ema)
    if prefix:
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in state.items() if not _PRETEXT.match(name)}


def _prefix(path: Path, state: Iterable[str], ema: bool) -> str:
    matches = [match for name in state if (match := _PATCHES.fullmatch(name))]
    # `backbone.` belongs to mmpretrain's names, and is a wrapper's before timm's.
    prefixes = sorted({
        m["prefix"] + (m["root"] if m["root"] == "backbone." and m[0].endswith("patch_embed.proj.weight") else "")
        for m in matches
    })  # fmt: skip
    prefixes = [p for p in prefixes if not p.endswith("decoder.")]
    if len(prefixes) < 2:
        return prefixes[0] if prefixes else ""
    for wanted in (lambda p: bool(_AVERAGED.search(p)) == ema, lambda p: "teacher" in p, lambda p: p == ""):
        chosen = [p for p in prefixes if wanted(p)]
        if len(chosen) == 1:
            return chosen[0]
    raise DeitfastError(f"{path} holds several models, under {', '.join(prefixes)}. Save one of them alone")
