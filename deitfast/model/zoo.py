"""The model variants: sizes, published accuracy, where weights lie. No torch here, so listing is instant.

Names are timm's. Sources of the published numbers: README_deit.md and README_revenge.md of facebookresearch/deit
(weights, top-1, DeiT's top-5), configs/deit and configs/deit3 of open-mmlab/mmpretrain (parameters, multiply-adds,
DeiT III's top-5, its own weights). The eight hexadecimal digits at the end of a weight file's name are the first of its
sha256. DeiT III's files carry none and nobody publishes their hash, so of those only the length can be checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deitfast.errors import DeitfastError, did_you_mean

_DEIT = "https://dl.fbaipublicfiles.com/deit"
_MMPRETRAIN = "https://download.openmmlab.com/mmclassification/v0/deit"
_LAYER_NORM_FLOPS = 5  # a value; the published multiply-adds count LayerNorm so


@dataclass(frozen=True)
class Variant:
    """One architecture and, where there are any, its published weights.

    Lengths in pixels. params_millions, macs_billions: published parameters and multiply-adds of one image. top1, top5:
    published accuracy of the weights at `url` on ImageNet-1k in percent, by `source`, at `crop_ratio`; measured_top1:
    ours, None where not yet measured. layer_scale: initial factor, None for none. class_position: whether the prefix
    tokens have position embeddings.
    """

    width: int
    heads: int
    image_size: int = 224
    depth: int = 12
    patch_size: int = 16
    distilled: bool = False
    layer_scale: float | None = None
    class_position: bool = True
    params_millions: float | None = None
    macs_billions: float | None = None
    top1: float | None = None
    top5: float | None = None
    crop_ratio: float = 0.875
    source: str = ""
    url: str = ""
    measured_top1: float | None = None

    @property
    def prefix_tokens(self) -> int:
        return 2 if self.distilled else 1

    @property
    def tokens(self) -> int:
        """Patches and prefix tokens."""
        return (self.image_size // self.patch_size) ** 2 + self.prefix_tokens

    @property
    def prefix_positions(self) -> int:
        return self.prefix_tokens if self.class_position else 0

    @property
    def positions(self) -> int:
        """Position embeddings."""
        return self.tokens - self.prefix_tokens + self.prefix_positions

    def parameters(self, classes: int = 1000) -> int:
        """Number of parameters, by formula."""
        D, prefix = self.width, self.prefix_tokens
        block = 12 * D * D + 13 * D + (2 * D if self.layer_scale else 0)
        embedding = 3 * self.patch_size**2 * D + D + self.positions * D + prefix * D
        return self.depth * block + embedding + 2 * D + prefix * (D + 1) * classes

    def multiply_adds(self) -> int:
        """Multiply-adds of one image as mmpretrain's tables count them: all matrix products but the heads' (which add
        `width x classes` each), and 5 a value of LayerNorm."""
        D, N = self.width, self.tokens
        block = 12 * N * D * D + 2 * N * N * D
        patches = (N - self.prefix_tokens) * 3 * self.patch_size**2 * D
        return self.depth * block + patches + (2 * self.depth + 1) * _LAYER_NORM_FLOPS * N * D


_TINY: dict[str, Any] = {"width": 192, "heads": 3}
_SMALL: dict[str, Any] = {"width": 384, "heads": 6}
_BASE: dict[str, Any] = {"width": 768, "heads": 12}
_LARGE: dict[str, Any] = {"width": 1024, "heads": 16, "depth": 24}
_HUGE: dict[str, Any] = {"width": 1280, "heads": 16, "depth": 32, "patch_size": 14}


def _published(numbers: tuple[float, ...]) -> dict[str, Any]:
    return dict(zip(("params_millions", "macs_billions", "top1", "top5"), numbers, strict=True))


def _deit(name: str, digest: str, size: dict[str, Any], published: tuple[float, ...], px: int = 224) -> Variant:
    return Variant(
        **size,
        **_published(published),
        image_size=px,
        distilled="distilled" in name,
        source="DeiT authors",
        url=f"{_DEIT}/{name}-{digest}.pth",
    )


def _deit3(name: str, size: dict[str, Any], published: tuple[float, ...], px: int = 224, data: str = "1k") -> Variant:
    return Variant(
        **size,
        **_published(published),
        image_size=px,
        layer_scale=1e-4,
        class_position=False,
        crop_ratio=1.0,
        source="DeiT III authors",
        url=f"{_DEIT}/deit_3_{name}_{px}_{data}.pth",
    )


_DEIT_TABLE: list[tuple[Any, ...]] = [
    ("deit_tiny_patch16_224", "a1311bcf", _TINY, (5.72, 1.26, 72.2, 91.1)),
    ("deit_small_patch16_224", "cd65a155", _SMALL, (22.05, 4.61, 79.9, 95.0)),
    ("deit_base_patch16_224", "b5f2ef4d", _BASE, (86.57, 17.58, 81.8, 95.6)),
    ("deit_tiny_distilled_patch16_224", "b40b3cf7", _TINY, (5.91, 1.27, 74.5, 91.9)),
    ("deit_small_distilled_patch16_224", "649709d9", _SMALL, (22.44, 4.63, 81.2, 95.4)),
    ("deit_base_distilled_patch16_224", "df68dfff", _BASE, (87.34, 17.67, 83.4, 96.5)),
    ("deit_base_patch16_384", "8de9b5d1", _BASE, (86.86, 55.54, 82.9, 96.2), 384),
    ("deit_base_distilled_patch16_384", "d0272ac0", _BASE, (87.63, 55.65, 85.2, 97.2), 384),
]
VARIANTS: dict[str, Variant] = {name: _deit(name, *facts) for name, *facts in _DEIT_TABLE} | {
    "deit3_small_patch16_224": _deit3("small", _SMALL, (22.06, 4.61, 81.4, 95.3)),
    "deit3_small_patch16_384": _deit3("small", _SMALL, (22.21, 15.52, 83.4, 96.7), 384),
    "deit3_medium_patch16_224": _deit3("medium", {"width": 512, "heads": 8}, (38.85, 8.0, 83.0, 96.2)),
    "deit3_base_patch16_224": _deit3("base", _BASE, (86.59, 17.58, 83.8, 96.6)),
    "deit3_base_patch16_384": _deit3("base", _BASE, (86.88, 55.54, 85.0, 97.3), 384),
    "deit3_large_patch16_224": _deit3("large", _LARGE, (304.37, 61.6, 84.9, 97.0)),
    "deit3_large_patch16_384": _deit3("large", _LARGE, (304.76, 191.21, 85.8, 97.6), 384),
    "deit3_huge_patch14_224": _deit3("huge", _HUGE, (632.13, 167.4, 85.2, 97.4)),
    # Not in the papers: the same network at 384 px for the smaller sizes; one that learns digits on two CPU cores; and
    # two for CIFAR-10, for a GPU and for a CPU core.
    "deit_tiny_patch16_384": Variant(**_TINY, image_size=384),
    "deit_small_patch16_384": Variant(**_SMALL, image_size=384),
    "deit_tiny_distilled_patch16_384": Variant(**_TINY, image_size=384, distilled=True),
    "deit_small_distilled_patch16_384": Variant(**_SMALL, image_size=384, distilled=True),
    "deit_digits_patch4_16": Variant(128, 4, image_size=16, depth=4, patch_size=4),
    "deit_mini_patch4_32": Variant(192, 3, image_size=32, depth=6, patch_size=4),
    "deit_mini_distilled_patch4_32": Variant(192, 3, image_size=32, depth=6, patch_size=4, distilled=True),
    "deit_micro_patch4_32": Variant(96, 3, image_size=32, depth=4, patch_size=4),
    "deit_micro_distilled_patch4_32": Variant(96, 3, image_size=32, depth=4, patch_size=4, distilled=True),
}


def _trained_by_mmpretrain(name: str, file: str, top1: float, top5: float) -> Variant:
    return replace(VARIANTS[name], top1=top1, top5=top5, source="mmpretrain", url=f"{_MMPRETRAIN}/{file}.pth")


OTHER_WEIGHTS: dict[str, Variant] = {
    "deit-tiny_4xb256_in1k": _trained_by_mmpretrain(
        "deit_tiny_patch16_224", "deit-tiny_pt-4xb256_in1k_20220218-13b382a0", 74.50, 92.24
    ),
    "deit-small_4xb256_in1k": _trained_by_mmpretrain(
        "deit_small_patch16_224", "deit-small_pt-4xb256_in1k_20220218-9425b9bb", 80.69, 95.06
    ),
    "deit-base_16xb64_in1k": _trained_by_mmpretrain(
        "deit_base_patch16_224", "deit-base_pt-16xb64_in1k_20220216-db63c16c", 81.76, 95.81
    ),
}
"""Weights of the same architectures by others, under the names their users know."""


def list_models() -> list[str]:
    """The names of the architectures that `create_model` knows, sorted. It also takes those of mmpretrain, of timm with
    its tag (`.fb_in1k`) and of Hugging Face (`facebook/deit-tiny-patch16-224`)."""
    return sorted(VARIANTS)


def find_variant(name: str) -> Variant:
    """The variant called `name`; DeitfastError with the nearest name where there is none."""
    if name in OTHER_WEIGHTS:
        return OTHER_WEIGHTS[name]
    known = canonical_name(name)
    if known not in VARIANTS:
        hint = did_you_mean(name, [*VARIANTS, *OTHER_WEIGHTS]) or " `deitfast models` lists them."
        raise DeitfastError(f"model {name!r} unknown.{hint}")
    return VARIANTS[known]


def canonical_name(name: str) -> str:
    """timm's name of the architecture that mmpretrain, Hugging Face or tagged timm call `name`; else `name` itself."""
    if name in VARIANTS:
        return name
    plain = name.removeprefix("hf-hub:").removeprefix("timm/").removesuffix(".fb_in1k")
    plain = plain.removeprefix("facebook/").replace("-patch", "_patch").replace("16-", "16_").replace("deit-", "deit_")
    if plain.replace("-", "_") in VARIANTS:
        return plain.replace("-", "_")
    if found := re.fullmatch(r"deit-(tiny|small|base)(-distilled)?_.*in1k(-384px)?", name):
        return f"deit_{found[1]}{'_distilled' if found[2] else ''}_patch16_{384 if found[3] else 224}"
    if found := re.fullmatch(r"deit3-(\w+)-p(\d+)_(?!in21k).*in1k(-384px)?", name):
        return f"deit3_{found[1]}_patch{found[2]}_{384 if found[3] else 224}"
    return name


Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors by timm's names."""


def architecture(shapes: Shapes) -> tuple[int, int, int, bool, bool] | None:
    """Width, patch size, depth, whether there is a distillation token, whether there is LayerScale; None: no ViT."""
    patches = shapes.get("patch_embed.proj.weight", ())
    if len(patches) != 4:
        return None
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.") and name.endswith("norm1.weight")})
    return patches[0], patches[2], depth, "dist_token" in shapes, "blocks.0.ls1.gamma" in shapes


def recognise(shapes: Shapes) -> str | None:
    """The variant whose shapes these are, or None where they are no DeiT of this list.

    One of another image size is the answer where none has the very size.
    """
    sought, positions = architecture(shapes), shapes.get("pos_embed", ())
    fitting = [
        name
        for name, v in VARIANTS.items()
        if (v.width, v.patch_size, v.depth, v.distilled, v.layer_scale is not None) == sought
    ]
    exact = [name for name in fitting if positions[1:2] == (VARIANTS[name].positions,)]
    return next(iter(exact or fitting), None)
