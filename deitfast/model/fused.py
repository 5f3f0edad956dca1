"""The transformer block through the Triton kernels: a function over its tensors, and the DeiT block that calls it.

    x = x + path_scale1 * ls1 * (attention(LayerNorm(x) Wqkv^T + bqkv) Wproj^T + bproj)      one op, layernorm_attention
    x = x + path_scale2 * ls2 * MLP(LayerNorm(x))                                            one op, layernorm_mlp

Saved for the backward, in values a token (D width, F hidden width; of all but x, only for the images that drop-path
runs through the branch):

    layernorm_attention    x D, LayerNorm(x) D, qkv 3D, attention's output D; in fp32 mean, rstd and one value a head
    layernorm_mlp          x D, LayerNorm(x) D, gelu F, gelu' F; in fp32 mean and rstd; with `recompute` x D alone

The eager block of `deitfast.model.deit` is the reference. On CPU tensors the ops take their eager implementation,
unless TRITON_INTERPRET=1 runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.attention_op import HEAD_DIMS
from deitfast.kernels.catalogue import Shape
from deitfast.kernels.common import DTYPES, INTERPRETED
from deitfast.kernels.layernorm_attention_op import layernorm_attention
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv
from deitfast.kernels.linear_residual_op import linear_residual
from deitfast.kernels.patch_embed_op import patch_embed
from deitfast.kernels.replaced import CHOSEN
from deitfast.model.deit import Block, DeiT, Subset, attend, embeds_by_weight, split_qkv
from deitfast.model.fitness import Fusible, is_wrapper
from deitfast.verification.verify import BLOCK_OPS, Question


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

    @classmethod
    def of(
        cls, norm1: Any, qkv: Any, proj: Any, norm2: Any, fc1: Any, fc2: Any,
        ls1: Tensor | None = None, ls2: Tensor | None = None,
    ) -> BlockTensors:  # fmt: skip
        """Of layers that each have a weight and a bias."""
        first = [tensor for layer in (norm1, qkv, proj) for tensor in (layer.weight, layer.bias)]
        second = [tensor for layer in (norm2, fc1, fc2) for tensor in (layer.weight, layer.bias)]
        return cls._make((*first, ls1, *second, ls2))


def fused_block_forward(
    x_BND: Tensor,
    tensors: BlockTensors,
    num_heads: int,
    *,
    eps1: float = 1e-6,
    eps2: float = 1e-6,
    path_scale1_B: Tensor | None = None,
    path_scale2_B: Tensor | None = None,
    subset: Subset | None = None,
    prefix: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """A pre-norm block with exact GELU: x (B, N, D) -> (B, N, D) in the same dtype.

    path_scale1_B, path_scale2_B: fp32 factors of the two residual branches of each image, 0 where drop-path drops one.
    subset: instead of them the images that run through the branches; the others pass unchanged.
    prefix: the first so many tokens of the result alone, (B, prefix, D), where no other is read. Then LayerNorm, keys
    and values are of all tokens, and all else of the block, most of its work, of `prefix` rows an image.
    recompute: keep of the MLP its input alone for the backward.
    Under autocast the products run in its dtype and x keeps its own, as in eager PyTorch.
    Raises TypeError or ValueError, from the op concerned, for tensors that do not fit.
    """
    t = tensors
    index1_K, index2_K, scale = (None, None, 1.0) if subset is None else (*subset.index_2K, subset.scale)
    if prefix is None:
        x_BND = layernorm_attention(
            x_BND.contiguous(),  # patches straight from a convolution, with no class token, arrive transposed
            t.norm1_weight,
            t.norm1_bias,
            t.qkv_weight,
            t.qkv_bias,
            t.proj_weight,
            t.proj_bias,
            num_heads,
            eps1,
            gamma=t.ls1,
            path_scale=path_scale1_B,
            subset=index1_K,
            subset_scale=scale,
        )
    else:
        x_BND = _attention_of_prefix(x_BND, t, num_heads, prefix, eps1, path_scale1_B, index1_K, scale)
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
        path_scale=path_scale2_B,
        subset=index2_K,
        subset_scale=scale,
        recompute=recompute,
    )


def _attention_of_prefix(
    x_BND: Tensor, t: BlockTensors, num_heads: int, prefix: int, eps: float, path_scale_B: Tensor | None,
    index_K: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The first `prefix` rows of `layernorm_attention`, (B, prefix, D). Attention of so few queries is PyTorch's."""
    x_BPD = x_BND[:, :prefix].contiguous()
    x_BND = x_BND if index_K is None else x_BND[index_K]
    (q_weight, kv_weight), norm = split_qkv(t.qkv_weight), (t.norm1_weight, t.norm1_bias)
    q_bias, kv_bias = (None, None) if t.qkv_bias is None else split_qkv(t.qkv_bias)
    kv_BNE = layernorm_qkv(x_BND, *norm, kv_weight, kv_bias, eps)
    q_BPD = layernorm_qkv(x_BND[:, :prefix].contiguous(), *norm, q_weight, q_bias, eps)
    out_BPD = attend(q_BPD, kv_BNE, num_heads)
    if index_K is None:
        return linear_residual(out_BPD, t.proj_weight, t.proj_bias, x_BPD, t.ls1, path_scale_B)
    branch_KPD = F.linear(out_BPD, t.proj_weight, t.proj_bias) * (1.0 if t.ls1 is None else t.ls1)
    return x_BPD.index_add(0, index_K, branch_KPD.to(x_BPD.dtype), alpha=scale)


def saved_bytes_per_token(width: int, hidden: int, itemsize: int, head_dim: int = 64, recompute: bool = False) -> int:
    """Bytes that one fused block saves for its backward for each token, parameters not counted; see the module.

    width, hidden: channels of the stream and of the MLP's hidden layer; itemsize: bytes of a value, 2 in bf16.
    The stream that leaves the last block is not among them.
    """
    attention, statistics = 6 * width * itemsize, 4 * (2 + width // head_dim)
    mlp = width * itemsize + (0 if recompute else saved_bytes_of_hidden(width, hidden, itemsize))
    return attention + statistics + mlp


def saved_bytes_of_hidden(width: int, hidden: int, itemsize: int) -> int:
    """Those of them that `recompute` computes again: LayerNorm's result and statistics, gelu and gelu'."""
    return (width + 2 * hidden) * itemsize + 4 * 2


def saved_bytes_of_keys_and_values(width: int, itemsize: int) -> int:
    """Bytes that a block for the prefix alone saves for each token that only gives keys and values."""
    return 4 * width * itemsize + 4 * 2


def question_about(model: DeiT, ops: tuple[str, ...], batch: int, dtype: torch.dtype, **more: Any) -> Question:
    """What to verify before `model` runs `batch` images through these ops. more: further fields of the question."""
    block: Any = model.blocks[0]
    without = () if hasattr(block.ls1, "gamma") else ("gamma",)
    shape = Shape(
        model.width, block.attn.num_heads, model.pos_embed.shape[1], batch, prefix=1 + model.distilled,
        patch_size=model.patch_size, classes=model.num_classes,
    )  # fmt: skip
    more["without"] = (*without, *more.get("without", ()))
    return Question(ops, shape, str(dtype).removeprefix("torch."), **more)


def runs_kernels() -> bool:
    """Whether a fused block's two ops run their kernels on a GPU, and not eager PyTorch, which keeps more."""
    return not CHOSEN.keys() & set(BLOCK_OPS)


def block_tensors(block: Any) -> BlockTensors:
    """The tensors of a block with timm's names."""
    attn, mlp, scales = block.attn, block.mlp, [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
    return BlockTensors.of(block.norm1, attn.qkv, attn.proj, block.norm2, mlp.fc1, mlp.fc2, *scales)


# What the kernels cannot do ------------------------------------------------------------------------------------------


def wrong_class(name: str, module: Any, **allowed: tuple[str, ...]) -> Iterator[str]:
    """A reason if `module` is none of the classes `allowed` (library -> names); subclasses may compute anything."""
    library, _, inside = type(module).__module__.partition(".")
    known = library != "torch" or inside.startswith("nn.modules.")  # torch.ao has other classes of the same names
    if not known or type(module).__name__ not in allowed.get(library, ()):
        yield f"{name} is a {type(module).__module__}.{type(module).__name__}"


def head_problems(width: int, num_heads: int, scale: float) -> Iterator[str]:
    """What of attention heads no kernel takes. scale: what the scores are multiplied with."""
    if width % num_heads or width // num_heads not in HEAD_DIMS:
        yield f"head dimension {width / num_heads:g}; supported are {', '.join(map(str, HEAD_DIMS))}"
    if abs(scale * (width / num_heads) ** 0.5 - 1) > 1e-6:
        yield f"it scales its attention scores by {scale:g}, not by one over the root of the head dimension"


def layer_problems(norms: Mapping[str, Any], linears: Mapping[str, Any], activation: Any = None) -> Iterator[str]:
    """What every block's layers must be. activation: the module, None where the block's code says GELU."""
    for name, norm in norms.items():
        yield from wrong_class(name, norm, torch=("LayerNorm",), timm=("LayerNorm",))
        if getattr(norm, "_fast_norm", False):
            yield f"{name} is timm's fast norm, which rounds differently"
        if norm.weight is None or norm.bias is None:
            yield f"{name} has no weight or no bias"
    for name, linear in linears.items():
        yield from wrong_class(name, linear, torch=("Linear", "NonDynamicallyQuantizableLinear"))
        if linear.weight.dtype not in DTYPES:
            yield f"{name} is {linear.weight.dtype}; supported are bfloat16, float16 and float32"
        if is_wrapper(linear.weight):
            yield f"{name}'s weight is a {type(linear.weight).__name__}"
    if activation is None:
        return
    yield from wrong_class("activation", activation, torch=("GELU",), timm=("GELU",), transformers=("GELUActivation",))
    if getattr(activation, "approximate", "none") != "none":
        yield f"its GELU is the {activation.approximate} approximation, the kernels' is exact"


def problems_by_timms_names(block: Any, library: str, activation: Any = None) -> Iterator[str]:
    """What no kernel takes of a block with timm's names, whose modules should be `library`'s."""
    attn, mlp = block.attn, block.mlp
    yield from wrong_class("attn", attn, **{library: ("Attention",)})
    yield from wrong_class("mlp", mlp, **{library: ("Mlp",)})
    for name in ("ls1", "ls2"):
        yield from wrong_class(name, getattr(block, name), **{library: ("LayerScale",)}, torch=("Identity",))
    yield from layer_problems(
        norms={"norm1": block.norm1, "norm2": block.norm2},
        linears={"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2},
        activation=activation,
    )


# Our own model -------------------------------------------------------------------------------------------------------


class FusedBlock(Fusible, Block):
    """`deitfast.model.deit.Block`, same parameters and names, computed by the kernels."""

    original = Block
    computes_prefix = True
    on_cpu = True
    """False: the kernels only where the input is on a GPU (or in Triton's interpreter), eager PyTorch on CPU."""

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        return problems_by_timms_names(block, "deitfast")  # of its heads the ops themselves tell

    def forward(self, x_BND: Tensor, drop: Tensor | Subset | None = None, prefix: int | None = None) -> Tensor:
        if not (self.on_cpu or x_BND.is_cuda or INTERPRETED) or self.steps_aside(x_BND):
            return super().forward(x_BND, drop, prefix)
        subset = drop if isinstance(drop, Subset) else None
        path_scale1_B, path_scale2_B = drop if isinstance(drop, Tensor) else (None, None)
        return fused_block_forward(
            x_BND,
            block_tensors(self),
            self.attn.num_heads,
            eps1=self.norm1.eps,
            eps2=self.norm2.eps,
            path_scale1_B=path_scale1_B,
            path_scale2_B=path_scale2_B,
            subset=subset,
            prefix=prefix,
            recompute=self.recompute,
        )


class FusedDeiT(DeiT):
    """`deitfast.model.deit.DeiT`, same parameters and names, whose patches become tokens in one kernel."""

    on_cpu = True
    """As `FusedBlock.on_cpu`."""

    def embed_patches(self, patches_BPK: Tensor) -> Tensor:
        by_kernel = self.on_cpu or patches_BPK.is_cuda or INTERPRETED
        if patches_BPK.requires_grad or not by_kernel or not embeds_by_weight(self.patch_embed):
            return super().embed_patches(patches_BPK)
        proj = self.patch_embed.proj
        assert proj.bias is not None
        prefix_TD = torch.cat([self.cls_token, self.dist_token] if self.distilled else [self.cls_token], 1)[0]
        return patch_embed(patches_BPK, proj.weight.flatten(1), proj.bias, prefix_TD, self.positions()[0])


def fuse(model: DeiT, on_cpu: bool = True) -> DeiT:
    """Turn `model` into a `FusedDeiT` of `FusedBlock`s, in place; parameters and state dict stay what they are.

    on_cpu: False leaves a model that runs on CPU in eager PyTorch.
    """
    fused: Any = model
    fused.__class__ = FusedDeiT
    fused.on_cpu = on_cpu
    block: Any
    for block in model.blocks:
        block.__class__ = FusedBlock
        block.on_cpu = on_cpu
    return model
