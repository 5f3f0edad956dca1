"""The model variants: sizes, published accuracy, the authors' weights. No torch here, so listing is instant.

Names are timm's. Accuracy is the DeiT authors' own table (README_deit.md of facebookresearch/deit, evaluated at
crop ratio .875); the eight leading characters of a weight file's sha256 are part of its published name.
"""

from __future__ import annotations

from dataclasses import dataclass

from deitfast.errors import DeitfastError, did_you_mean

_WEIGHTS = "https://dl.fbaipublicfiles.com/deit"


@dataclass(frozen=True)
class Variant:
    """One architecture. Lengths in pixels; `url` is empty where no weights are published."""

    width: int
    heads: int
    image_size: int = 224
    depth: int = 12
    patch_size: int = 16
    distilled: bool = False
    params_millions: float | None = None
    top1: float | None = None
    url: str = ""


def _published(
    name: str, width: int, heads: int, digest: str, params: float, top1: float, **kwargs
) -> dict[str, Variant]:
    url = f"{_WEIGHTS}/{name}-{digest}.pth"
    return {name: Variant(width, heads, params_millions=params, top1=top1, url=url, **kwargs)}


VARIANTS: dict[str, Variant] = {
    **_published("deit_tiny_patch16_224", 192, 3, "a1311bcf", 5.72, 72.2),
    **_published("deit_small_patch16_224", 384, 6, "cd65a155", 22.05, 79.9),
    **_published("deit_base_patch16_224", 768, 12, "b5f2ef4d", 86.57, 81.8),
    **_published("deit_tiny_distilled_patch16_224", 192, 3, "b40b3cf7", 5.91, 74.5, distilled=True),
    **_published("deit_small_distilled_patch16_224", 384, 6, "649709d9", 22.44, 81.2, distilled=True),
    **_published("deit_base_distilled_patch16_224", 768, 12, "df68dfff", 87.34, 83.4, distilled=True),
    **_published("deit_base_patch16_384", 768, 12, "8de9b5d1", 86.86, 82.9, image_size=384),
    **_published("deit_base_distilled_patch16_384", 768, 12, "d0272ac0", 87.63, 85.2, image_size=384, distilled=True),
    # Not in the paper: the same network at 384 px for the smaller sizes, and one that learns digits on two CPU cores.
    "deit_tiny_patch16_384": Variant(192, 3, image_size=384),
    "deit_small_patch16_384": Variant(384, 6, image_size=384),
    "deit_tiny_distilled_patch16_384": Variant(192, 3, image_size=384, distilled=True),
    "deit_small_distilled_patch16_384": Variant(384, 6, image_size=384, distilled=True),
    "deit_digits_patch4_16": Variant(128, 4, image_size=16, depth=4, patch_size=4),
}


def list_models() -> list[str]:
    """The names `create_model` knows, sorted."""
    return sorted(VARIANTS)


def find_variant(name: str) -> Variant:
    """The variant called `name`; DeitfastError with the nearest name where there is none."""
    if name not in VARIANTS:
        hint = did_you_mean(name, VARIANTS) or " `deitfast models` lists them."
        raise DeitfastError(f"model {name!r} unknown.{hint}")
    return VARIANTS[name]


def recognise(tensors: dict[str, tuple[int, ...]]) -> str | None:
    """The variant whose shapes these are (tensor name -> shape), or None where they are no DeiT of this list."""
    try:
        width, _, patch_size, _ = tensors["patch_embed.proj.weight"]
        tokens = tensors["pos_embed"][1]
    except (KeyError, ValueError, IndexError):
        return None
    distilled = "dist_token" in tensors
    side = round((tokens - 1 - distilled) ** 0.5) * patch_size
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    for name, v in VARIANTS.items():
        if (v.width, v.patch_size, v.image_size, v.depth, v.distilled) == (width, patch_size, side, depth, distilled):
            return name
    return None
