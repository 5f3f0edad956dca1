"""Models by name: fresh, or with weights from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deitfast.errors import DeitfastError
from deitfast.model.class_names import class_names
from deitfast.model.deit import DeiT
from deitfast.model.fused import fuse
from deitfast.model.preprocessing import Preprocessing
from deitfast.model.weights import WeightFile, fill, published_weights, read_weights
from deitfast.model.zoo import Variant, find_variant
from deitfast.recipe import Recipe

_NEITHER = "neither a model nor weights. Give a model's name (`deitfast models`) or a weight file"


def create_model(
    name: str | None = None,
    pretrained: bool | str | Path = False,
    *,
    weights: str | Path | WeightFile | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    constant_drop_path: bool = False,
    layer_scale: float | None = None,
    reset_head: bool = False,
    depth: int | None = None,
    fused: bool | None = None,
    ema: bool = False,
) -> DeiT:
    """A DeiT by timm's name.

    name: as `deitfast models` lists them; None to tell it from the weights.
    weights: what `read_weights` takes (a file, a run's folder, a URL) or returns; None for fresh ones. pretrained: the
        same under timm's and mmpretrain's name; True for the authors' published weights (downloaded once and checked
        against the hash in their name).
    classes: the data's class names, for which `num_classes` need not be given; a head whose weights name their classes
        is brought into their order, or refused.
    num_classes, image_size, layer_scale: those of the weights where None (image_size: or 0, as in the commands), else
        1000 and the name's own. Position embeddings of weights are interpolated to the image size.
    drop_path: probability of dropping a residual branch of the last block; it rises linearly from 0 over depth, or is
        the same in every block with constant_drop_path.
    reset_head: start the heads at zero, whatever the weights' class count.
    depth: blocks; None for the name's own. Fewer make another, smaller model: for smoke tests.
    fused: True runs the blocks through the ops of `deitfast.kernels`, False in eager PyTorch; None decides by where the
        model runs: fused on CUDA, eager on CPU.
    ema: the averaged weights, where a run keeps both.
    Raises DeitfastError for an unknown name and for a weight file that is another model's.
    """
    if weights is not None and pretrained:
        raise DeitfastError("weights and pretrained are the same. Give one of them")
    source = weights if weights is not None else pretrained
    if name is not None:
        find_variant(name)  # before anything is read
    elif not source or source is True:
        raise DeitfastError(_NEITHER)
    if source is True:
        source = published_weights(str(name))
    if ema and not source:
        raise DeitfastError("ema chooses among a run's weights, and none are given. Give weights=")
    file = source if isinstance(source, WeightFile) else read_weights(source, ema=ema) if source else None
    shapes = file.shapes if file else {}
    known = file.told_model() if file and name is None else str(name)
    variant = find_variant(known)
    if file and not image_size:
        image_size = _own_size(file, variant, by_positions=name is None)
    if num_classes is None:
        trained = None if reset_head else shapes.get("head.weight")
        num_classes = len(classes) if classes is not None else trained[0] if trained else 1000
    if layer_scale is None:
        layer_scale = 1.0 if "blocks.0.ls1.gamma" in shapes else variant.layer_scale
    model = DeiT(
        width=variant.width,
        depth=variant.depth if depth is None else depth,
        num_heads=variant.heads,
        image_size=image_size or variant.image_size,
        patch_size=variant.patch_size,
        num_classes=num_classes,
        drop_path=drop_path,
        constant_drop_path=constant_drop_path,
        layer_scale=layer_scale,
        class_position=variant.class_position,
        distilled=variant.distilled,
    )
    if file:
        fill(model, file, known, reset_head, classes)
    if fused or (fused is None and torch.cuda.is_available()):
        fuse(model, on_cpu=bool(fused))
    return model


def model_of(recipe: Recipe, classes: Sequence[str], depth: int | None = None) -> DeiT:
    """The recipe's model, with weights from `init` where given."""
    return create_model(
        recipe.model,
        pretrained=recipe.init or False,
        classes=classes,
        image_size=recipe.image_size or find_variant(recipe.model).image_size,
        drop_path=recipe.drop_path,
        constant_drop_path=recipe.drop_path_schedule == "constant",
        layer_scale=recipe.layer_scale or None,
        reset_head=recipe.reset_head,
        depth=depth,
        fused=recipe.fuses,
    )


def _own_size(file: WeightFile, variant: Variant, by_positions: bool) -> int | None:
    """The image side that weights state for themselves, or have positions for, where the model can have it."""
    size, positions = file.stated.get("image_size"), file.shapes.get("pos_embed", ())
    if isinstance(size, int) and size > 0 and size % variant.patch_size == 0:
        return size
    if by_positions and len(positions) == 3:
        return math.isqrt(max(positions[1] - variant.prefix_positions, 1)) * variant.patch_size
    return None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what is needed to use it.

    model: on the CPU. name: of the model, timm's. classes: names in index order, for a reader. preprocessing: how its
    images are resized, cut and normalised. stored: class names that the weights hold, as they hold them, or None.
    """

    model: DeiT
    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    stored: tuple[str, ...] | None = None

    @property
    def crop_ratio(self) -> float:
        """Share of the resized image's side that the centre crop keeps."""
        return self.preprocessing.crop_ratio


def as_loaded(model: DeiT, classes: Sequence[str] | None = None) -> LoadedModel:
    """A model that is at hand, with the classes and the preprocessing that its weights brought."""
    names = class_names(model.num_classes, classes or model.classes)
    return LoadedModel(model, "", names, Preprocessing().changed(model.stated), model.classes)


def load_model(
    name: str | None,
    weights: str | Path | None = None,
    *,
    ema: bool = False,
    num_classes: int | None = None,
    image_size: int | None = None,
    fused: bool | None = None,
) -> LoadedModel:
    """A model ready for use, on the CPU.

    name: as for `create_model`; None to tell it from the file. weights: what `read_weights` takes; None for the
    published ones of `name`. ema: the averaged weights, where a run keeps both. fused: as for `create_model`.
    num_classes, image_size: the file's where None (image_size: or 0, as in the commands); a file that does not state
    its image size has `name`'s where a name is given. Raises DeitfastError for weights that do not fit.
    """
    if weights is None and name is None:
        raise DeitfastError(_NEITHER)
    file = read_weights(published_weights(str(name)) if weights is None else weights, ema=ema)
    model = create_model(name, weights=file, num_classes=num_classes, image_size=image_size, fused=fused).eval()
    known = name or file.told_model()
    variant = find_variant(known)
    preprocessing = Preprocessing(crop_ratio=variant.crop_ratio).changed(file.stated)
    return LoadedModel(model, known, class_names(model.num_classes, file.classes), preprocessing, model.classes)
