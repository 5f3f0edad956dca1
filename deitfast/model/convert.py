"""Tensor names of other libraries' DeiTs, to ours (timm's) and back. Values are never changed, but for two cases:

- Hugging Face keeps queries, keys and values in three matrices; here they are the thirds of one.
- Hugging Face's DeiTForImageClassification reads the class token alone though there is a distillation token. Here both
  heads are averaged, so its head is doubled and the distillation head is zero: the same logits. While such a model is
  trained, the class head's logits are twice as large; start a new head for that.

Sources: names in transformers' models/deit and models/vit (files carry the names of its version 4, modules of version 5
others), tools/model_converters/deit3_to_mmpretrain.py of open-mmlab/mmpretrain, models_v2.py of facebookresearch/deit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deitfast.errors import DeitfastError
from deitfast.model.vetting import MOST_BLOCKS

State = Mapping[str, Tensor]

# Ours -> theirs: names of modules or of single tensors. A block's names follow "blocks.N." here; "*" is its number.
_HUGGINGFACE_TOP = {
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HUGGINGFACE_FILES = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_HUGGINGFACE_MODULES = _HUGGINGFACE_FILES | {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_MMPRETRAIN = {
    "cls_token": "backbone.cls_token",
    "dist_token": "backbone.dist_token",
    "pos_embed": "backbone.pos_embed",
    "patch_embed.proj": "backbone.patch_embed.projection",
    "blocks.*.norm1": "backbone.layers.*.ln1",
    "blocks.*.attn.qkv": "backbone.layers.*.attn.qkv",
    "blocks.*.attn.proj": "backbone.layers.*.attn.proj",
    "blocks.*.ls1.gamma": "backbone.layers.*.attn.gamma1.weight",
    "blocks.*.norm2": "backbone.layers.*.ln2",
    "blocks.*.mlp.fc1": "backbone.layers.*.ffn.layers.0.0",
    "blocks.*.mlp.fc2": "backbone.layers.*.ffn.layers.1",
    "blocks.*.ls2.gamma": "backbone.layers.*.ffn.gamma2.weight",
    "norm": "backbone.ln1",
    "head": "head.layers.head",
    "head_dist": "head.layers.head_dist",
}
_NOT_OURS = re.compile(r"pooler\.|(.*\.)?embeddings\.mask_token$|data_preprocessor\.")


def layout_of(names: Iterable[str]) -> str:
    """Whose names these are: `timm` (and ours and the authors'), `huggingface`, `mmpretrain`; empty where unknown."""
    for name in names:
        if name == "patch_embed.proj.weight":
            return "timm"
        if name.endswith("embeddings.patch_embeddings.projection.weight"):
            return "huggingface"
        if name.endswith("patch_embed.projection.weight"):
            return "mmpretrain"
    return ""


def to_ours(state: State) -> dict[str, Tensor]:
    """`state` of any of the layouts under our names; tensors of no known name keep theirs."""
    layout = layout_of(state)
    if layout == "huggingface":
        state = _from_huggingface(state)
    elif layout == "mmpretrain":
        state = _renamed(state, _inverse(_MMPRETRAIN))
    return {re.sub(r"^(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma", name): t for name, t in state.items()}


def to_mmpretrain(state: State) -> dict[str, Tensor]:
    """Our `state` as mmpretrain's VisionTransformer, DistilledVisionTransformer or DeiT3 classifier has it."""
    return _renamed(state, _MMPRETRAIN)


def to_huggingface(state: State) -> tuple[str, dict[str, Tensor]]:
    """Our `state` as files of transformers have it, and the class that reads it.

    A distilled model becomes DeiTForImageClassificationWithTeacher, or DeiTForImageClassification where its
    distillation head is zero; one without distillation token becomes ViTForImageClassification, the same network.
    Raises DeitfastError for LayerScale, which neither has.
    """
    if "blocks.0.ls1.gamma" in state:
        raise DeitfastError("transformers has no DeiT with LayerScale. Export to timm or safetensors instead")
    split: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{letter}.")] = third
        else:
            split[name] = tensor
    if "dist_token" not in state:
        kind, root, heads = "ViTForImageClassification", "vit.", {"head": "classifier"}
    elif state["head_dist.weight"].any() or state["head_dist.bias"].any():
        kind, root = "DeiTForImageClassificationWithTeacher", "deit."
        heads = {"head": "cls_classifier", "head_dist": "distillation_classifier"}
    else:
        kind, root, heads = "DeiTForImageClassification", "deit.", {"head": "classifier"}
        for name in ("weight", "bias"):
            split[f"head.{name}"] = split[f"head.{name}"] / 2
            del split[f"head_dist.{name}"]
    return kind, _renamed(split, _huggingface_names(_HUGGINGFACE_FILES, "encoder.layer", root) | heads)


def _from_huggingface(state: State) -> dict[str, Tensor]:
    state = {name: tensor for name, tensor in state.items() if not _NOT_OURS.match(name)}
    root = next(r for r in ("deit.", "vit.", "") if any(name.startswith(f"{r}embeddings.") for name in state))
    old = any(name.startswith(f"{root}encoder.layer.") for name in state)
    block, where = (_HUGGINGFACE_FILES, "encoder.layer") if old else (_HUGGINGFACE_MODULES, "layers")
    heads = {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"}
    split = _renamed(state, _inverse(_huggingface_names(block, where, root)) | heads)
    joined: dict[str, Tensor] = {}
    for name, tensor in split.items():
        third = re.search(r"\.attn\.([qkv])\.", name)
        if third is None:
            joined[name] = tensor
        elif third[1] == "q" and all(name.replace(".q.", f".{letter}.") in split for letter in "kv"):
            parts = [split[name.replace(".q.", f".{letter}.")] for letter in "qkv"]
            joined[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    if "dist_token" in joined and "classifier.weight" in state:
        for name in ("weight", "bias"):
            joined[f"head_dist.{name}"] = torch.zeros_like(joined[f"head.{name}"])
            joined[f"head.{name}"] = joined[f"head.{name}"] * 2
    return joined


def _huggingface_names(block: Mapping[str, str], where: str, root: str) -> dict[str, str]:
    top = {ours: root + theirs for ours, theirs in _HUGGINGFACE_TOP.items()}
    return top | {f"blocks.*.{ours}": f"{root}{where}.*.{theirs}" for ours, theirs in block.items()}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in names.items()}


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """`state` with whole names, or what stands before the last dot, replaced.

    Raises DeitfastError for the number of a block that no model has.
    """

    def new(name: str) -> str:
        block = re.search(r"\.(\d+)\.", name)
        number = block[1] if block else ""
        if len(number) > 4 or int(number or 0) >= MOST_BLOCKS:
            raise DeitfastError(
                f"a tensor's name says block {number[:20]}: no vision transformer has {MOST_BLOCKS} blocks"
            )
        pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
        stem, _, suffix = pattern.rpartition(".")
        found = names.get(pattern) or (f"{names[stem]}.{suffix}" if stem in names else pattern)
        return found.replace("*", number)

    return {new(name): tensor for name, tensor in state.items()}
