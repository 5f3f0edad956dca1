"""DeiT in plain PyTorch: the eager reference of everything that is fused elsewhere.

Touvron et al. 2021, "Training data-efficient image transformers & distillation through attention" (arXiv 2012.12877).
Tensor names, and therefore state dicts, are timm's; parameters are fp32. Shape suffixes: B images, N tokens (prefix
tokens first, then patches row by row), D width, H heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from deitfast.errors import DeitfastError
from deitfast.model.fitness import HOOKS

LAYER_NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, S, S) -> (B, (S / patch)^2, D)."""

    def __init__(self, image_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.num_patches = (image_size // patch_size) ** 2
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention on packed q, k, v: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BND), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        out_BHNK = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out_BHNK, "b h n k -> b n (h k)"))

    def of_prefix(self, x_BND: Tensor, prefix: int) -> Tensor:
        """The first `prefix` rows of `forward`, (B, prefix, D)."""
        (q_weight, kv_weight), (q_bias, kv_bias) = split_qkv(self.qkv.weight), split_qkv(self.qkv.bias)
        q_BPD = F.linear(x_BND[:, :prefix], q_weight, q_bias)
        if q_BPD.dtype in (torch.float16, torch.bfloat16):
            return self.proj(attend(q_BPD, F.linear(x_BND, kv_weight, kv_bias), self.num_heads))
        return self.proj(attend_to_rows(q_BPD, x_BND, kv_weight, kv_bias, self.num_heads))


def split_qkv(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Weight or bias of a packed q, k, v projection, (3D, ...), as that of q (D, ...) and of k and v (2D, ...)."""
    q, kv = packed.split([packed.shape[0] // 3, packed.shape[0] // 3 * 2])
    return q, kv


def attend(q_BPD: Tensor, kv_BNE: Tensor, num_heads: int) -> Tensor:
    """Attention of queries (B, P, D) to packed keys and values (B, N, 2D): (B, P, D)."""
    q = rearrange(q_BPD, "b p (h k) -> b h p k", h=num_heads)
    k, v = rearrange(kv_BNE, "b n (two h k) -> two b h n k", two=2, h=num_heads)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h p k -> b p (h k)")


def attend_to_rows(q_BPD: Tensor, x_BND: Tensor, kv_weight: Tensor, kv_bias: Tensor, num_heads: int) -> Tensor:
    """`attend` to the keys and values of x, (B, P, D), which are not computed: for few queries, and not in 16 bits.

    With x_n a row, q (Wk x_n) = (q Wk) x_n, and sum_n p_n (Wv x_n) = Wv sum_n p_n x_n: the weights meet P rows
    an image and head instead of N. The keys' bias shifts all scores of a query alike, which softmax ignores,
    and the values' is added to a mean. The scores are rounded to the dtype of x, where `attend` keeps fp32.
    """
    k_weight, v_weight = rearrange(kv_weight, "(two h k) d -> two h k d", two=2, h=num_heads)
    q_BPHK = q_BPD.unflatten(-1, (num_heads, -1)) * k_weight.shape[1] ** -0.5
    scores = torch.einsum("bphk,hkd->bphd", q_BPHK, k_weight).flatten(1, 2) @ x_BND.mT
    mean_BPHD = (scores.softmax(-1) @ x_BND).unflatten(1, (-1, num_heads))
    return torch.einsum("bphd,hkd->bphk", mean_BPHD, v_weight).flatten(2) + kv_bias.chunk(2)[1]


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between: (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.gamma


class Subset(NamedTuple):
    """Drop-path by subset: only these images run through a block's two branches, each scaled by batch / K."""

    index_2K: Tensor  # int64, ascending: images of the batch that keep the attention branch, and the MLP branch
    scale: float


class Block(nn.Module):
    """Pre-norm transformer block.

    drop: drop-path of one block. A tensor (2, B) scales the two residual branches of each image; `Subset` runs them for
    some of the images only, and the others pass unchanged; None leaves the branches whole.
    """

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    recompute = False
    """True: of the MLP its input alone is kept for the backward, which computes LayerNorm, fc1 and GELU again."""
    computes_prefix = True
    """Said by each class whose forward knows `prefix`, and not by one derived from it."""

    def forward(self, x_BND: Tensor, drop: Tensor | Subset | None = None, prefix: int | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D), or with `prefix` the first `prefix` tokens of it alone, (B, prefix, D)."""
        attn = self.attn if prefix is None else partial(self.attn.of_prefix, prefix=prefix)
        x_BPD = x_BND[:, :prefix]
        x_BPD = _add_branch(x_BPD, x_BND, lambda x: self.ls1(attn(self.norm1(x))), drop, 0)
        again = self.recompute and torch.is_grad_enabled()
        return _add_branch(x_BPD, x_BPD, self._mlp_recomputed if again else self._mlp, drop, 1)

    def _mlp(self, x_BPD: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x_BPD)))

    def _mlp_recomputed(self, x_BPD: Tensor) -> Tensor:
        return checkpoint(self._mlp, x_BPD, use_reentrant=False, preserve_rng_state=False)


def _add_branch(
    to_BPD: Tensor, x_BND: Tensor, branch: Callable[[Tensor], Tensor], drop: Tensor | Subset | None, which: int
) -> Tensor:
    """to + branch(x) under drop-path; `which`: 0 for the attention branch, 1 for the MLP branch."""
    if drop is None:
        return to_BPD + branch(x_BND)
    if isinstance(drop, Subset):
        index_K = drop.index_2K[which]
        return to_BPD.index_add(0, index_K, branch(x_BND[index_K]).to(to_BPD.dtype), alpha=drop.scale)
    out_BPD = branch(x_BND)
    return to_BPD + out_BPD * drop[which, :, None, None].to(out_BPD.dtype)


_OWN = (Attention, Mlp, LayerScale, nn.LayerNorm, nn.Linear, nn.Identity)


def prefix_alone(block: nn.Module) -> bool:
    """Whether `block` may leave out the tokens that no head reads: what is inside is ours, and nobody watches.

    A hook would see fewer tokens, an adapter or another module in place of ours would not be called or might mix them.
    """
    if "computes_prefix" not in vars(type(block)):
        return False
    if any(module is not block and type(module) not in _OWN for module in block.modules()):
        return False
    return not _is_watched(block)


def _is_watched(part: nn.Module) -> bool:
    """Whether a module or one inside it has a hook or a patched forward."""
    inside = [vars(module) for module in part.modules()]
    return any("forward" in i or any(i[kind] for kind in HOOKS) for i in inside) or _has_any_global_hook()


def embeds_by_weight(part: nn.Module) -> bool:
    """Whether the tokens of patches are what the convolution's weight and bias make of them.

    Not where another module stands in the place of the patch embedding's, or hooks (weight-norm is one) go with it.
    """
    proj = getattr(part, "proj", None)
    if type(part) is not PatchEmbed or type(proj) is not nn.Conv2d or proj.bias is None or _is_watched(part):
        return False
    plain = proj.kernel_size == proj.stride and proj.padding == (0, 0) and proj.dilation == (1, 1)
    return plain and proj.groups == 1


# What torch.compiler.assume_constant_result does, which would import all of Dynamo with this module.
prefix_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]
embeds_by_weight._dynamo_marked_constant = True  # type: ignore[attr-defined]


class DeiT(nn.Module):
    """A DeiT / ViT classifier.

    image_size, patch_size: pixels; the image is square and a whole number of patches.
    drop_path: probability of dropping a residual branch in the last block; it rises linearly from 0 over depth, or is
        the same in every block with constant_drop_path.
    layer_scale: initial LayerScale factor, None for none.
    class_position: whether the class (and distillation) tokens have position embeddings; DeiT III's have none.
    distilled: adds the distillation token and its head. In training `forward` then returns both heads' logits, as the
        paper's code does; in evaluation, their mean.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        constant_drop_path: bool = False,
        layer_scale: float | None = None,
        class_position: bool = True,
        distilled: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, width, num_heads, num_classes, drop_path)
        self.width, self.image_size, self.patch_size, self.num_classes = width, image_size, patch_size, num_classes
        self.num_prefix_tokens = 2 if distilled else 1
        self.num_prefix_positions = self.num_prefix_tokens if class_position else 0
        # What weights brought along: their classes in index order; image_size and fields of `Preprocessing`.
        self.classes: tuple[str, ...] | None = None
        self.stated: dict[str, Any] = {}
        self.drop_path_rates = [drop_path * (1 if constant_drop_path else i / max(depth - 1, 1)) for i in range(depth)]
        self.patch_embed = PatchEmbed(image_size, patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_positions + self.patch_embed.num_patches, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        if distilled:
            self.head_dist = nn.Linear(width, num_classes)
        self.init_weights()

    @property
    def distilled(self) -> bool:
        """Whether it has a distillation token, and a head of its own for it."""
        return self.num_prefix_tokens == 2

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the timm of the paper did: truncated normal .02, zero biases, default patch convolution."""
        for name, parameter in self.named_parameters():
            if name.endswith("_token") or name == "pos_embed":
                nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def heads(self) -> Iterator[tuple[str, nn.Linear]]:
        """The classification head, then the distillation head where there is one."""
        yield "head", self.head
        if self.distilled:
            yield "head_dist", self.head_dist

    def draw_path_scales(self, batch: int, device: torch.device) -> Tensor | None:
        """Drop-path scales (depth, 2, batch) in fp32 from torch's generator, or None where nothing is ever dropped."""
        if not any(self.drop_path_rates):
            return None
        uniform = torch.rand(len(self.blocks), 2, batch, device=device)
        return path_scales(uniform, self.drop_path_rates)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), normalised, or their patches, to the tokens (B, N, D) that enter the first block.

        Patches (B, P, 3 * patch * patch) are row by row, each as the weight of the patch convolution has it: channel,
        y, x.
        """
        if images.ndim == 3:
            return self.embed_patches(images)
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images are {images.shape[-2]} x {images.shape[-1]}, the model takes {self.image_size} x "
                f"{self.image_size}: resize them, or create the model with image_size={images.shape[-1]}"
            )
        return self._with_prefix(self.patch_embed(images))

    def embed_patches(self, patches_BPK: Tensor) -> Tensor:
        """`embed` of patches."""
        if not embeds_by_weight(self.patch_embed):
            side, patch = self.image_size // self.patch_size, self.patch_size
            images = rearrange(patches_BPK, "b (y x) (c p q) -> b c (y p) (x q)", y=side, c=3, p=patch)
            return self._with_prefix(self.patch_embed(images))
        proj = self.patch_embed.proj
        return self._with_prefix(F.linear(patches_BPK, proj.weight.flatten(1), proj.bias))

    def _with_prefix(self, x_BPD: Tensor) -> Tensor:
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        x_BND = torch.cat([*(t.expand(x_BPD.shape[0], -1, -1) for t in tokens), x_BPD], dim=1)
        return x_BND + self.positions()

    def positions(self) -> Tensor:
        """Position embeddings of every token (1, N, D): zero for prefix tokens that have none of their own."""
        missing = self.num_prefix_tokens - self.num_prefix_positions
        return F.pad(self.pos_embed, (0, 0, missing, 0)) if missing else self.pos_embed

    def forward_features(self, images: Tensor, drop: Tensor | Sequence[Subset | None] | None = None) -> Tensor:
        """Images (B, 3, S, S), normalised, or their patches (see `embed`) to normalised tokens (B, N, D).

        drop: drop-path scales (depth, 2, B), 0 where a branch is dropped and 1 / (1 - p) where it is not, or a
        `Subset` (or None) a block. Drawn from torch's generator in training where none is given; ignored in evaluation.
        """
        return self._features(images, drop, None)

    def prefix_features(self, images: Tensor, drop: Tensor | Sequence[Subset | None] | None = None) -> Tensor:
        """The class (and distillation) token of `forward_features`, (B, 1 or 2, D): all that the heads read.

        The last block computes these rows alone; of the other tokens it needs what attention reads, nothing else.
        """
        return self._features(images, drop, self.num_prefix_tokens)

    def _features(self, images: Tensor, drop: Tensor | Sequence[Subset | None] | None, prefix: int | None) -> Tensor:
        if not self.training:
            drop = None
        elif drop is None:
            drop = self.draw_path_scales(images.shape[0], images.device)
        x_BND = self.embed(images)
        alone = prefix if prefix_alone(self.blocks[-1]) else None
        for i, block in enumerate(self.blocks):
            x_BND = block(x_BND, None if drop is None else drop[i], alone if i == len(self.blocks) - 1 else None)
        return self.norm(x_BND[:, :prefix])

    def extract_feat(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features a head reads: (class token,) or (class token, distillation token), each (B, D)."""
        return self.prefix_features(images).unbind(1)

    def forward(
        self, images: Tensor, drop: Tensor | Sequence[Subset | None] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, classes); for a distilled model in training both heads' logits. See `forward_features`."""
        x_BPD = self.prefix_features(images, drop)
        logits = self.head(x_BPD[:, 0])
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(x_BPD[:, 1])
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2


def path_scales(uniform: Tensor, drop_path_rates: list[float]) -> Tensor:
    """Uniform draws (depth, 2, B) in [0, 1) to drop-path scales: 0 with the block's probability p, else 1 / (1 - p)."""
    p = torch.tensor(drop_path_rates, dtype=uniform.dtype, device=uniform.device)[:, None, None]
    return (uniform >= p) / (1 - p)


def resize_pos_embed(pos_embed: Tensor, num_patches: int, num_prefix_tokens: int) -> Tensor:
    """Position embeddings (1, N, D) for another number of patches: bicubic and antialiased, as timm does it.

    Prefix tokens keep theirs; both grids are square.
    """
    prefix, grid = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    if grid.shape[1] == num_patches:
        return pos_embed
    old, new = math.isqrt(grid.shape[1]), math.isqrt(num_patches)
    image = rearrange(grid.float(), "1 (y x) d -> 1 d y x", y=old)
    image = F.interpolate(image, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([prefix, rearrange(image, "1 d y x -> 1 (y x) d").to(pos_embed.dtype)], dim=1)


def _check_sizes(image_size: int, patch_size: int, width: int, num_heads: int, classes: int, drop_path: float) -> None:
    checks: list[tuple[bool, str]] = [
        (image_size > 0 and image_size % patch_size == 0, f"image size {image_size} is no multiple of {patch_size} px"),
        (width % num_heads == 0, f"width {width} is no multiple of {num_heads} heads"),
        (classes > 0, f"class count {classes} is not positive"),
        (0 <= drop_path < 1, f"drop-path {drop_path} is outside [0, 1)"),
    ]
    for valid, message in checks:
        if not valid:
            raise DeitfastError(message)
