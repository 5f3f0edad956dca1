"""What of a library's classifier reads class tokens alone, so that the last block need compute no other.

Only what `forward` of the classifier itself returns is known to depend on nothing else: `forward_features`, outputs of
single layers and hidden states want all tokens. So `reading_forward` names the last block for the time of such a call
alone, by the classifier's settings of that moment, and only where all that stands between the block and the head is the
library's own, without hooks or patches. A block that does not find itself named computes all tokens.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from deitfast.model.fitness import RECORDERS, dotted, foreign, hooks_of

_READ: ContextVar[tuple[nn.Module, int] | None] = ContextVar("deitfast_read_tokens", default=None)
"""The last block of the classifier that runs in this thread, and how many tokens its head reads."""

_ROW_BY_ROW = {"torch": ("LayerNorm", "Identity"), "timm": ("LayerNorm",)}


def tokens_read(block: nn.Module) -> int | None:
    """How many of the first tokens of `block` are read in this call; None for all."""
    if torch.compiler.is_compiling():  # context variables are beyond it
        return None
    named = _READ.get()
    return named[1] if named is not None and named[0] is block else None


def reading_forward(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a library's classifier, which says while it runs what it reads of the last block."""
    library, compiling, read, find = original.forward, torch.compiler.is_compiling, _READ, _find

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if compiling():
            return library(self, *args, **kwargs)
        token = read.set(find(self, kwargs))
        try:
            return library(self, *args, **kwargs)
        finally:
            read.reset(token)

    # torch.fx wraps the functions that it must not trace in the globals of the root's forward: give it the library's.
    own = types.FunctionType(forward.__code__, library.__globals__, closure=forward.__closure__)  # type: ignore[attr-defined]
    return functools.wraps(library)(own)  # trainers look at its arguments


Found = tuple[nn.Module, int] | None
"""The last block and the tokens that are read of it; None for all."""


def _timm(model: Any, arguments: Mapping[str, Any]) -> Found:
    """timm's VisionTransformer with class-token pooling, and its distilled one. Checkpoints run blocks again later."""
    distilled = hasattr(model, "head_dist")
    if model.grad_checkpointing or not (distilled or (model.global_pool == "token" and model.attn_pool is None)):
        return None
    if not _own(model, "forward_features", "forward_head", "pool") or type(model.blocks) is not nn.Sequential:
        return None
    return _named(model.blocks, 1 + distilled, model.blocks, model.norm)


_BASES = ("transformers.models.vit.modeling_vit.ViTModel", "transformers.models.deit.modeling_deit.DeiTModel")


def _transformers(model: Any, arguments: Mapping[str, Any]) -> Found:
    """transformers' ViT and DeiT for image classification, the latter with a teacher too."""
    base = getattr(model, model.base_model_prefix)
    asked = arguments.get("output_hidden_states"), getattr(base.config, "output_hidden_states", None)
    if any(value is not None and value is not False for value in asked):  # 0 is the number of a layer
        return None
    if dotted(type(base)) not in _BASES or base.layers[-1].gradient_checkpointing:
        return None
    return _named(base.layers, 1 + hasattr(model, "distillation_classifier"), base, base.layernorm)


def _torchvision(model: Any, arguments: Mapping[str, Any]) -> Found:
    """torchvision's VisionTransformer."""
    encoder = model.encoder
    if dotted(type(encoder)) != "torchvision.models.vision_transformer.Encoder":
        return None
    if type(encoder.layers) is not nn.Sequential:
        return None
    return _named(encoder.layers, 1, encoder, encoder.layers, encoder.ln)


_READERS: dict[str, Callable[[Any, Mapping[str, Any]], Found]] = {
    "timm.models.vision_transformer.VisionTransformer": _timm,
    "timm.models.deit.VisionTransformerDistilled": _timm,
    "transformers.models.vit.modeling_vit.ViTForImageClassification": _transformers,
    "transformers.models.deit.modeling_deit.DeiTForImageClassification": _transformers,
    "transformers.models.deit.modeling_deit.DeiTForImageClassificationWithTeacher": _transformers,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision,
}
"""Classifier's class -> what says which tokens it reads."""


def is_classifier(model: nn.Module) -> bool:
    """Whether `model` is a classifier, of a class known here, that reads class tokens alone as it is set now."""
    return dotted(type(model)) in _READERS and _find(model, {}) is not None


def _find(model: nn.Module, arguments: Mapping[str, Any]) -> Found:
    original = getattr(model, "original", type(model))
    try:
        return None if foreign(original, "forward") else _READERS[dotted(original)](model, arguments)
    except AttributeError:  # another version's layout
        return None


def _named(blocks: Any, count: int, *between: nn.Module) -> Found:
    """The last block, where nobody watches it or what stands `between` it and the head, whose last is a norm."""
    last, norm = blocks[-1], between[-1]
    if type(norm).__name__ not in _ROW_BY_ROW.get(type(norm).__module__.partition(".")[0], ()):
        return None
    plain = all(_own(module, "forward") and not hooks_of(module) for module in between)
    watched = [hook for hook in hooks_of(last) if getattr(hook, "__module__", "") != RECORDERS]
    return (last, count) if plain and not watched and "forward" not in vars(last) else None


def _own(module: nn.Module, *methods: str) -> bool:
    """Whether these methods are the module's own library's."""
    return not any(name in vars(module) or foreign(type(module), name) for name in methods if hasattr(module, name))
