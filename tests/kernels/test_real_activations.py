"""The linear ops on what they meet in a trained network: DeiT-Ti's own weights, and its activations of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from deitfast.kernels.catalogue import Inputs
from tests.kernels.linear_ops import OPS, check

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nan_filled_empty")]
HEADS, EPS = 3, 1e-6


@pytest.fixture(scope="module")
def weights(shared_data: Path) -> dict[str, Tensor]:
    return load_file(shared_data / "weights" / "deit_tiny_patch16_224.safetensors")


@pytest.fixture(scope="module")
def inputs(shared_data: Path, weights: dict[str, Tensor]) -> dict[int, dict[str, Inputs]]:
    """Block -> op -> its inputs, in fp32, for one photograph run through the network."""
    photograph = sorted((shared_data / "imagenette" / "val").rglob("*.JPEG"))[0]
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = ((torch.tensor(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]
    patches = F.conv2d(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=16)
    x = torch.cat([weights["cls_token"], patches.flatten(2).mT], dim=1) + weights["pos_embed"]
    collected = {}
    for depth in range(12):
        w = {
            name.removeprefix(f"blocks.{depth}."): tensor
            for name, tensor in weights.items()
            if f"blocks.{depth}." in name
        }
        qkv = {
            "x": x,
            "ln_weight": w["norm1.weight"],
            "ln_bias": w["norm1.bias"],
            "weight": w["attn.qkv.weight"],
            "bias": w["attn.qkv.bias"],
        }
        q, k, v = OPS["layernorm_qkv"].reference(**qkv).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        projection = {"x": attended, "weight": w["attn.proj.weight"], "bias": w["attn.proj.bias"], "residual": x}
        x = OPS["linear_residual"].reference(**projection)
        layers = {f"fc{i}_{kind}": w[f"mlp.fc{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
        norm = {"ln_weight": w["norm2.weight"], "ln_bias": w["norm2.bias"]}
        mlp = {"x": x} | norm | layers
        hidden = {"x": F.layer_norm(x, x.shape[-1:], norm["ln_weight"], norm["ln_bias"], EPS)} | layers
        collected[depth] = {
            "layernorm_qkv": qkv,
            "linear_residual": projection,
            "layernorm_mlp": mlp,
            "mlp_gelu": hidden,
        }
        x = OPS["layernorm_mlp"].reference(**mlp, residual=True)
    return collected


@pytest.mark.parametrize("depth", [0, 11])
@pytest.mark.parametrize("name", OPS)
def test_matches_float64(inputs, device, dtype, name, depth):
    cast = {key: tensor.to(device, dtype) for key, tensor in inputs[depth][name].items() if tensor is not None}
    check(OPS[name], cast)
