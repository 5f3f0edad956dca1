"""The transformer block through the Triton kernels: a function over its tensors, and the DeiT block that calls it.

    qkv = LayerNorm(x) Wqkv^T + bqkv                    one op
    a   = softmax attention of qkv                      one op, no permutes, no copies
    x   = x + keep1 * ls1 * (a Wproj^T + bproj)         one op
    x   = x + keep2 * ls2 * MLP(LayerNorm(x))           one op

The eager block of `deitfast.model` is the reference. On CPU tensors the ops take their eager implementation, unless
TRITON_INTERPRET=1 runs the kernels in Triton's interpreter. This is the one module of the package that imports
`deitfast.kernels`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from deitfast.kernels.attention import HEAD_DIMS, attention
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.layernorm_mlp import layernorm_mlp
from deitfast.kernels.layernorm_qkv import layernorm_qkv
from deitfast.kernels.linear_residual import linear_residual
from deitfast.model import Block, DeiT

__all__ = ["HEAD_DIMS", "BlockTensors", "FusedBlock", "block_tensors", "fuse", "fused_block_forward"]


class BlockTensors(NamedTuple):
    """What one block computes with: D width, H heads, F hidden width. ls1 and ls2 are LayerScale's factors or None."""

    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor  # (D,)
    qkv_weight: Tensor  # (3D, D): q, k, v
    qkv_bias: Tensor | None  # (3D,)
    proj_weight: Tensor  # (D, D)
    proj_bias: Tensor | None  # (D,)
    ls1: Tensor | None  # (D,)
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor  # (D,)
    fc1_weight: Tensor  # (F, D)
    fc1_bias: Tensor | None  # (F,)
    fc2_weight: Tensor  # (D, F)
    fc2_bias: Tensor | None  # (D,)
    ls2: Tensor | None  # (D,)


def fused_block_forward(
    x_BND: Tensor,
    tensors: BlockTensors,
    num_heads: int,
    *,
    eps1: float = 1e-6,
    eps2: float = 1e-6,
    keep1_B: Tensor | None = None,
    keep2_B: Tensor | None = None,
) -> Tensor:
    """A pre-norm block with exact GELU: x (B, N, D) -> (B, N, D) in the same dtype.

    keep1_B, keep2_B: fp32 factors of the two residual branches of each image, 0 where drop-path drops one; None: 1.
    Under autocast the products run in its dtype and x keeps its own, as in eager PyTorch.
    Raises TypeError or ValueError, from the op concerned, for tensors that do not fit.
    """
    t = tensors
    x_BND = x_BND.contiguous()  # patches straight from a convolution, with no class token, arrive transposed
    qkv_BNE = layernorm_qkv(x_BND, t.norm1_weight, t.norm1_bias, t.qkv_weight, t.qkv_bias, eps1)
    out_BND = attention(qkv_BNE, num_heads)
    x_BND = linear_residual(out_BND, t.proj_weight, t.proj_bias, x_BND, gamma=t.ls1, keep=keep1_B)
    return layernorm_mlp(
        x_BND,
        t.norm2_weight,
        t.norm2_bias,
        t.fc1_weight,
        t.fc1_bias,
        t.fc2_weight,
        t.fc2_bias,
        eps2,
        residual=True,
        gamma=t.ls2,
        keep=keep2_B,
    )


def block_tensors(block: Any) -> BlockTensors:
    """The tensors of a block with timm's names."""
    return BlockTensors(
        block.norm1.weight,
        block.norm1.bias,
        block.attn.qkv.weight,
        block.attn.qkv.bias,
        block.attn.proj.weight,
        block.attn.proj.bias,
        getattr(block.ls1, "gamma", None),
        block.norm2.weight,
        block.norm2.bias,
        block.mlp.fc1.weight,
        block.mlp.fc1.bias,
        block.mlp.fc2.weight,
        block.mlp.fc2.bias,
        getattr(block.ls2, "gamma", None),
    )


class FusedBlock(Block):
    """`deitfast.model.Block`, same parameters and names, computed by the kernels."""

    everywhere = True
    """False: the kernels only where the input is on a GPU (or in Triton's interpreter), eager PyTorch on CPU."""

    def forward(self, x_BND: Tensor, keep_2B: Tensor | None = None) -> Tensor:
        if not (self.everywhere or x_BND.is_cuda or INTERPRETED):
            return super().forward(x_BND, keep_2B)
        keep1_B, keep2_B = (None, None) if keep_2B is None else keep_2B
        return fused_block_forward(
            x_BND,
            block_tensors(self),
            self.attn.num_heads,
            eps1=self.norm1.eps,
            eps2=self.norm2.eps,
            keep1_B=keep1_B,
            keep2_B=keep2_B,
        )


def fuse(model: DeiT, everywhere: bool = True) -> DeiT:
    """Turn the blocks of `model` into `FusedBlock`s, in place; parameters and state dict stay what they are.

    everywhere: False leaves a model that runs on CPU in eager PyTorch.
    """
    block: Any
    for block in model.blocks:
        block.__class__ = FusedBlock
        block.everywhere = everywhere
    return model
