"""What a model's images must be, as its weights' own files state it: timm's, Hugging Face's and our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deitfast.data.batch import IMAGENET_MEAN, IMAGENET_STD
from deitfast.files import read_json

_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """From a photo to the network's input; image sides in pixels.

    crop_ratio: share of the resized image's side that the centre crop keeps. squash: both sides are resized to the same
    length, whatever the photo's shape, instead of the short one. interpolation: PIL's name of the filter.
    """

    crop_ratio: float = 0.875
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    squash: bool = False

    def changed(self, stated: Mapping[str, Any]) -> Preprocessing:
        """With what is stated in place of its own values."""
        return replace(self, **{key: value for key, value in stated.items() if key in self.__dataclass_fields__})


def stated_in_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing`, and image_size, in the metadata of weights that deitfast wrote."""
    values = {name: _json(value) for name, value in metadata.items()}
    crop_ratio = values.get("eval_crop_ratio", values.get("crop_ratio"))
    return _sound(values | {"crop_ratio": crop_ratio, "interpolation": metadata.get("interpolation")})


def stated_beside(folder: Path) -> dict[str, Any]:
    """The same from timm's config.json, or Hugging Face's preprocessor_config.json, in a weight file's folder."""
    processor = read_json(folder / "preprocessor_config.json")
    if processor:
        return _of_processor(processor)
    config = read_json(folder / "config.json").get("pretrained_cfg")
    return _of_timm(config) if isinstance(config, dict) else {}


def _of_timm(config: Mapping[str, Any]) -> dict[str, Any]:
    size = config.get("input_size")
    return _sound({
        "image_size": size[2] if isinstance(size, list) and len(size) == 3 else None,
        "crop_ratio": config.get("crop_pct"),
        "mean": config.get("mean"),
        "std": config.get("std"),
        "interpolation": config.get("interpolation"),
        "squash": config.get("crop_mode") == "squash",
    })  # fmt: skip


def _of_processor(config: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face's ViT, DeiT and CLIP image processors, also as older versions write them."""
    found: dict[str, Any] = {"mean": config.get("image_mean"), "std": config.get("image_std")}
    resized, cropped = config.get("size"), config.get("crop_size")
    if isinstance(resized, dict):
        found["squash"] = "shortest_edge" not in resized
        resized = resized.get("shortest_edge", resized.get("height"))
    elif isinstance(resized, int):
        found["squash"] = True
    cropped = cropped.get("height") if isinstance(cropped, dict) else cropped
    crops = config.get("do_center_crop", "crop_size" in config) and isinstance(cropped, int)
    if isinstance(resized, int) and resized > 0 and config.get("do_resize", True):
        found["image_size"] = cropped if crops else resized
        found["crop_ratio"] = min(found["image_size"] / resized, 1.0)
    if config.get("do_normalize") is False:
        found |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    if config.get("resample") in _PIL_FILTERS:
        found["interpolation"] = _PIL_FILTERS[config["resample"]]
    return _sound(found)


def _sound(found: Mapping[str, Any]) -> dict[str, Any]:
    """What of `found` is an image_size or a field of `Preprocessing`; the rest, of a strange file, is left out."""
    sound: dict[str, Any] = {}
    size, crop_ratio = found.get("image_size"), found.get("crop_ratio")
    if isinstance(size, int):
        sound["image_size"] = size
    if isinstance(crop_ratio, (int, float)) and 0 < crop_ratio <= 1:
        sound["crop_ratio"] = float(crop_ratio)
    for name in ("mean", "std"):
        triple = found.get(name)
        if isinstance(triple, (list, tuple)) and len(triple) == 3 and all(isinstance(v, (int, float)) for v in triple):
            sound[name] = tuple(map(float, triple))
    if found.get("interpolation") in _PIL_FILTERS.values():
        sound["interpolation"] = found["interpolation"]
    if isinstance(found.get("squash"), bool):
        sound["squash"] = found["squash"]
    return sound


def _json(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return {"True": True, "False": False}.get(text)
