"""Class names: ImageNet's 1,000, and those that weights bring along. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from deitfast.errors import DeitfastError, did_you_mean

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


ORDERS = ("imagenet", "folders", "natural")
"""How labels may be given where names cannot tell: by ImageNet's synsets, or by the data's class names, sorted as text
(as torchvision and this program do) or as numbers where they are such (as timm does)."""


def labels_by_name(
    stored: Sequence[str] | None, count: int, found: Sequence[str], where: str, order: str | None = None
) -> tuple[dict[str, int], str]:
    """The label, in a model of `count` classes, of each class `found` in the data; and a line on what was assumed.

    stored: the names that the weights know. order: one of `ORDERS`, which then decides. Raises DeitfastError for
    classes that the weights do not know, and for a number of classes that says nothing.
    """
    if order in ("folders", "natural"):
        if len(found) != count:
            raise DeitfastError(f"{where} has {len(found)} classes, the model {count}: their order gives no labels")
        ordered = sorted(found, key=_natural) if order == "natural" else sorted(found)
        return {name: i for i, name in enumerate(ordered)}, ""
    names, assumed = _keys(stored, count, found, order)
    if names is None:
        if len(found) != count:
            raise DeitfastError(
                f"the model has {count} classes without names, {where} has {len(found)}: no labels follow. Give "
                "weights that know their classes, or --classes imagenet where the folders are ImageNet synsets"
            )
        ordered = sorted(found)
        return {name: i for i, name in enumerate(ordered)}, _order_taken(ordered)
    index: dict[str, int] = {}
    for i, name in enumerate(names):
        index[name] = -1 if name in index else i
    strange = [name for name in found if index.get(_key(name), -1) < 0]
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise DeitfastError(
            f"class {strange[0]!r}{more} of {where} is none of the {count} that the weights know "
            f"({_listed(stored or names)}).{did_you_mean(strange[0], stored or names)} Rename the folders, or give "
            "--classes folders to take their order for the labels"
        )
    return {name: index[_key(name)] for name in found}, assumed


def _keys(
    stored: Sequence[str] | None, count: int, found: Sequence[str], order: str | None
) -> tuple[list[str] | None, str]:
    """The model's classes by the keys of `_key`, in label order, or None where nothing names them; what was assumed."""
    synsets = list(_by_synset())
    if stored is not None and len(stored) == count:
        keys = _keys_in_order(stored)
        if len(set(keys)) > 1 or count == 1:
            return keys, ""
    if count == len(synsets) and (order == "imagenet" or set(found) <= set(synsets)):
        some = len(found) < count and order is None
        return synsets, "the weights hold no class names; ImageNet's order is taken for their 1,000" if some else ""
    if order == "imagenet":
        raise DeitfastError(f"--classes imagenet is for models of {len(synsets):,} classes, this one has {count}")
    return None, ""


def head_order(stored: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Row of a head that was trained on the classes `stored` for each class `wanted`, as many.

    Raises DeitfastError where they are not the same classes.
    """
    keys, ours = _keys_in_order(stored), _keys_in_order(wanted)
    if len(set(keys)) < len(keys) and keys == ours:
        return list(range(len(keys)))
    strange = [name for name, key in zip(wanted, ours, strict=True) if key not in keys]
    if strange or len(set(keys)) < len(keys):
        raise DeitfastError(
            f"{where}: its head knows the classes {_listed(stored)}, not the data's {_listed(strange or wanted)}. Add "
            "--reset-head (reset_head=True) to start a new head"
        )
    return [keys.index(key) for key in ours]


def _keys_in_order(names: Sequence[str]) -> list[str]:
    """Their keys; where they are ImageNet's in its order, its two cranes are told apart by their places."""
    keys, synsets = [_key(name) for name in names], list(_by_synset())
    imagenets = len(keys) == len(synsets) and sum(map(str.__eq__, keys, synsets)) > 0.9 * len(keys)
    return synsets if imagenets else keys


def _key(name: str) -> str:
    """A class's name in a form that is the same for an ImageNet synset and its words."""
    return _by_words().get(name, name)


@cache
def _by_words() -> dict[str, str]:
    found: dict[str, str] = {}
    for synset, words in _by_synset().items():
        found[words] = words if words in found else synset  # what two synsets are called says nothing
    return found


def _natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdecimal() else (10**9, name)


def _order_taken(names: Sequence[str]) -> str:
    natural = sorted(names, key=_natural)
    line = f"the weights hold no class names: the data's are taken in the order {_listed(names)} for labels 0, 1, ..."
    return line + (f"; --classes natural takes {_listed(natural)}, as timm does" if natural != list(names) else "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
