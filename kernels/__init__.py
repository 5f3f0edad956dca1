"""Triton kernels of the way into a DeiT and of its block, each behind a torch.library op with an eager CPU version."""

from deitfast.kernels.attention import attention
from deitfast.kernels.input import input_patches
from deitfast.kernels.layernorm_attention import layernorm_attention
from deitfast.kernels.layernorm_mlp import layernorm_mlp
from deitfast.kernels.layernorm_qkv import layernorm_qkv
from deitfast.kernels.linear_residual import linear_residual
from deitfast.kernels.mlp_gelu import mlp_gelu
from deitfast.kernels.patch_embed import patch_embed

__all__ = [
    "attention",
    "input_patches",
    "layernorm_attention",
    "layernorm_mlp",
    "layernorm_qkv",
    "linear_residual",
    "mlp_gelu",
    "patch_embed",
]
