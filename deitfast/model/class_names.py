"""Class names: ImageNet's 1,000, and those that weights bring along. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

_DATA = Path(__file__).parent.parent / "data"


@cache
def imagenet_names() -> tuple[str, ...]:
    """ImageNet-1k's class names in index order: WordNet's lemmas of each synset, as timm's
    `imagenet_synset_to_lemma.txt` lists them. Two classes are called "crane": a bird and a machine."""
    return tuple((_DATA / "imagenet_names.txt").read_text(encoding="utf-8").splitlines())


@cache
def _by_synset() -> dict[str, str]:
    return dict(zip((_DATA / "imagenet_synsets.txt").read_text().split(), imagenet_names(), strict=True))


def class_names(count: int, stored: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of a model's `count` classes in index order.

    stored: what the weight file says; used where it has the right length, with ImageNet's synsets put into words. Else
    ImageNet's names for 1,000 classes and `class 0`, `class 1`, ... for any other number.
    """
    if stored is not None and len(stored) == count:
        return tuple(_by_synset().get(name, name) for name in stored)
    return imagenet_names() if count == len(imagenet_names()) else tuple(f"class {i}" for i in range(count))
