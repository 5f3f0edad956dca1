"""Triton kernels of the DeiT block, each behind a torch.library op with an eager CPU implementation."""

from deitfast.kernels.attention import attention
from deitfast.kernels.layernorm_mlp import layernorm_mlp
from deitfast.kernels.layernorm_qkv import layernorm_qkv
from deitfast.kernels.linear_residual import linear_residual
from deitfast.kernels.mlp_gelu import mlp_gelu

__all__ = ["attention", "layernorm_mlp", "layernorm_qkv", "linear_residual", "mlp_gelu"]
