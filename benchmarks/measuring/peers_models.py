"""The same Vision Transformer in every library: ours, timm, torchvision and Hugging Face, with the same weights.

And our eager model with other libraries' parts, which approximate GELU by tanh: TransformerEngine's blocks, in bf16 and
FP8, and QuACK's MLP. Signatures and parameter names: transformer_engine/pytorch/transformer.py
(github.com/NVIDIA/TransformerEngine), quack/mlp.py (github.com/Dao-AILab/quack).

Weights are carried over by tensor name, so that all of them compute the same function; whether they do is checked by
whoever times them. Libraries are imported on use; one that is not installed raises ImportError.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.peers_ops import fp8_context
from deitfast.kernels.common import autocast
from deitfast.model.deit import LAYER_NORM_EPS, Mlp
from deitfast.model.factory import create_model
from deitfast.model.work import CLASSES
from deitfast.model.zoo import find_variant

PACKAGES = {
    "ours": "deitfast", "timm": "timm", "torchvision": "torchvision", "huggingface": "transformers",
    "transformer engine": "transformer-engine", "quack": "quack-kernels",
}  # fmt: skip
"""Library -> the distribution whose version counts."""

_TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
# The second of two alternatives is the name in transformers before 5.
_HUGGINGFACE = (
    (r"^vit\.embeddings\.cls_token$", "cls_token"),
    (r"^vit\.embeddings\.position_embeddings$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^vit\.layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^vit\.(?:layers|encoder\.layer)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:q_proj|attention\.query)\.", ".attn.q."),
    (r"\.attention\.(?:k_proj|attention\.key)\.", ".attn.k."),
    (r"\.attention\.(?:v_proj|attention\.value)\.", ".attn.v."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_TRANSFORMER_ENGINE = (
    (r"\.self_attention\.layernorm_qkv\.layer_norm_", ".norm1."),
    (r"\.layernorm_mlp\.layer_norm_", ".norm2."),
    (r"\.self_attention\.layernorm_qkv\.", ".attn.qkv."),
    (r"\.self_attention\.proj\.", ".attn.proj."),
    (r"\.layernorm_mlp\.(fc\d)_", r".mlp.\1."),
)
_NAMES = {"torchvision": _TORCHVISION, "huggingface": _HUGGINGFACE, "transformer engine": _TRANSFORMER_ENGINE}


def timm_name(name: str, library: str) -> str:
    """The timm name of a tensor of another library's; `attn.q`, `attn.k`, `attn.v` are thirds of timm's `attn.qkv`."""
    for pattern, replacement in _NAMES.get(library, ()):
        name = re.sub(pattern, replacement, name)
    return name


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    third = re.search(r"\.attn\.([qkv])\.", name)
    if third is None:
        return state[name]
    return state[name.replace(third[0], ".attn.qkv.")].chunk(3)["qkv".index(third[1])]


def reference_state(model: str) -> dict[str, Tensor]:
    """Weights for a comparison, the same on every machine: a fresh model with larger matrices and head.

    At DeiT's own initialisation the logits hardly depend on the blocks, and a wrong block would go unseen.
    """
    torch.manual_seed(0)
    state = create_model(model, fused=False).state_dict()
    for name, tensor in state.items():
        if re.search(r"(attn|mlp)\..*weight$", name):
            tensor.mul_(2.0)
        elif name == "head.weight":
            tensor.mul_(5.0)
    return state


def build(
    library: str, model: str, state: Mapping[str, Tensor], *, fused: bool = False, drop_path: float = 0.0,
    fp8: bool = False,
) -> Any:  # fmt: skip
    """`model` (a zoo name) as `library` has it, in training mode, with the weights of `state` (timm's names), on CPU.

    fused: ours through the kernels. drop_path: for ours and timm. fp8: for TransformerEngine. Raises ImportError where
    the library is absent.
    """
    variant = find_variant(model)
    sizes = {"image_size": variant.image_size, "patch_size": variant.patch_size}
    net: nn.Module
    if library == "ours":
        net = create_model(model, fused=fused, drop_path=drop_path)
    elif library == "timm":
        timm = _library("timm")
        net = timm.models.vision_transformer.VisionTransformer(
            img_size=variant.image_size,
            patch_size=variant.patch_size,
            embed_dim=variant.width,
            depth=variant.depth,
            num_heads=variant.heads,
            num_classes=CLASSES,
            drop_path_rate=drop_path,
        )
    elif library == "torchvision":
        torchvision = _library("torchvision")
        net = torchvision.models.VisionTransformer(
            **sizes,
            num_layers=variant.depth,
            num_heads=variant.heads,
            hidden_dim=variant.width,
            mlp_dim=4 * variant.width,
            num_classes=CLASSES,
        )
    elif library == "huggingface":
        transformers = _library("transformers")
        config = transformers.ViTConfig(
            **sizes,
            num_hidden_layers=variant.depth,
            num_attention_heads=variant.heads,
            hidden_size=variant.width,
            intermediate_size=4 * variant.width,
            num_labels=CLASSES,
            layer_norm_eps=LAYER_NORM_EPS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
        net = transformers.ViTForImageClassification(config)
    elif library == "transformer engine":
        net = _of_transformer_engine(model, fp8)
    elif library == "quack":
        importlib.import_module("quack.mlp")
        net = create_model(model, fused=False)
        for block in net.blocks:
            block.mlp.__class__ = _QuackMlp
    else:
        raise ValueError(f"library {library!r} unknown: {', '.join(PACKAGES)}")
    names = [name for name in net.state_dict() if not name.endswith("_extra_state")]  # FP8's scales
    net.load_state_dict({name: _tensor(state, timm_name(name, library)) for name in names}, strict=False)
    return net.train()


class _QuackMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        quack = importlib.import_module("quack.mlp")
        tensors = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        x, weight1, bias1, weight2, bias2 = autocast(x, x, *tensors)
        return quack.mlp_func(x, weight1, weight2, "gelu_tanh_approx", bias1=bias1, bias2=bias2)


def _of_transformer_engine(model: str, fp8: bool) -> nn.Module:
    engine, variant = importlib.import_module("transformer_engine.pytorch"), find_variant(model)
    net: Any = create_model(model, fused=False)
    net.blocks = nn.ModuleList(
        engine.TransformerLayer(
            variant.width,
            4 * variant.width,
            variant.heads,
            layernorm_epsilon=LAYER_NORM_EPS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="no_mask",
            fuse_qkv_params=True,
            qkv_weight_interleaved=False,
            attn_input_format="bshd",
            params_dtype=torch.float32,
            device="cpu",
        )
        for _ in range(variant.depth)
    )
    if fp8:
        net.forward = _in_fp8(engine, net.forward)
    return net


def _in_fp8(engine: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with fp8_context(engine):
            return forward(*args)

    return run


def logits_of(outputs: Any) -> Tensor:
    """Logits (B, classes) of any library's model: Hugging Face wraps them."""
    return getattr(outputs, "logits", outputs)


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES[library])
    except importlib.metadata.PackageNotFoundError:
        return None


def _library(name: str) -> Any:
    """Import one of them. On a machine without CUDA torchvision's wheel needs its operators declared first."""
    if name in ("timm", "transformers") and version("torchvision") is None:
        return importlib.import_module(name)
    from tests.reference import import_torchvision

    torchvision = import_torchvision()
    return torchvision if name == "torchvision" else importlib.import_module(name)
