"""Triton kernels of the way into a DeiT and of its block, each behind a torch.library op with an eager CPU version."""

from deitfast.kernels.attention_op import attention
from deitfast.kernels.input import input_patches
from deitfast.kernels.layernorm_attention_op import layernorm_attention
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv
from deitfast.kernels.linear_residual_op import linear_residual
from deitfast.kernels.mlp_gelu_op import mlp_gelu
from deitfast.kernels.patch_embed_op import patch_embed

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
