"""Models by name: fresh, or with weights from anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deitfast.errors import DeitfastError
from deitfast.model.class_names import class_names
from deitfast.model.convert import to_ours
from deitfast.model.deit import DeiT
from deitfast.model.fused import fuse
from deitfast.model.preprocessing import Preprocessing
from deitfast.model.weights import WeightFile, fill, layer_scale_of, published_weights, read_weights, shapes_of
from deitfast.model.zoo import Variant, find_variant, recognise
from deitfast.recipe import Recipe


def create_model(
    name: str | None = None,
    pretrained: bool | str | Path = False,
    *,
    weights: str | Path | None = None,
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
    weights: what `read_weights` takes: a file, a run's folder, a URL; None for fresh ones. pretrained: the same under
        timm's and mmpretrain's name; True for the authors' published weights (downloaded once and checked against the
        hash in their name).
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
    if name is None and (pretrained is True or not (weights or pretrained)):
        raise DeitfastError("neither a model nor weights. Give a model's name (`deitfast models`) or a weight file")
    if name is not None:
        find_variant(name)  # before anything is read
    source = weights if weights is not None else published_weights(str(name)) if pretrained is True else pretrained
    if ema and not source:
        raise DeitfastError("ema chooses among a run's weights, and none are given. Give weights=")
    file = read_weights(source, ema=ema) if source else None
    state = to_ours(file.tensors) if file else {}
    shapes = shapes_of(state)
    name = name or _told_by(file, shapes)
    variant = find_variant(name)
    if num_classes is None:
        trained = None if reset_head else shapes.get("head.weight")
        num_classes = len(classes) if classes is not None else trained[0] if trained else 1000
    model = DeiT(
        width=variant.width,
        depth=variant.depth if depth is None else depth,
        num_heads=variant.heads,
        image_size=image_size or _size_stated(file, variant) or variant.image_size,
        patch_size=variant.patch_size,
        num_classes=num_classes,
        drop_path=drop_path,
        constant_drop_path=constant_drop_path,
        layer_scale=(layer_scale_of(shapes) or variant.layer_scale) if layer_scale is None else layer_scale,
        class_position=variant.class_position,
        distilled=variant.distilled,
    )
    if file:
        fill(model, file, state, name, reset_head, classes)
    if fused or (fused is None and torch.cuda.is_available()):
        fuse(model, on_cpu=bool(fused))
    return model


def _told_by(file: WeightFile | None, shapes: dict[str, tuple[int, ...]]) -> str:
    """The name of the model that a file is of: as it states, or by its shapes. Raises DeitfastError where neither."""
    assert file is not None
    name = file.model or recognise(shapes)
    if name is None:
        raise DeitfastError(f"{file.path} holds weights of no model of the list. Give the model's name")
    return name


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


def _size_stated(file: WeightFile | None, variant: Variant) -> int | None:
    """The image side that weights state for themselves, where it is one that the model can have."""
    size = file.stated.get("image_size") if file else None
    return size if isinstance(size, int) and size > 0 and size % variant.patch_size == 0 else None


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


def as_loaded(model: DeiT, classes: Sequence[str] | None = None, name: str = "") -> LoadedModel:
    """A model that is at hand, with the classes and the preprocessing that its weights brought."""
    names = class_names(model.num_classes, classes or model.classes)
    return LoadedModel(model, name, names, Preprocessing().changed(model.stated), model.classes)


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
    if weights is None:
        if name is None:
            raise DeitfastError("neither a model nor weights. Give a model's name (`deitfast models`) or a weight file")
        weights = published_weights(name)
    file = read_weights(weights, ema=ema)
    state = to_ours(file.tensors)
    shapes = shapes_of(state)
    known = name or _told_by(file, shapes)
    variant = find_variant(known)
    image_size = image_size or _size_stated(file, variant)
    if name is None and image_size is None and len(shapes.get("pos_embed", ())) == 3:
        patches = shapes["pos_embed"][1] - variant.prefix_positions
        image_size = math.isqrt(max(patches, 1)) * variant.patch_size
    count = num_classes or (shapes["head.weight"][0] if "head.weight" in shapes else 1000)
    model = create_model(
        known, num_classes=count, image_size=image_size, layer_scale=layer_scale_of(shapes), fused=fused
    )
    fill(model, file, state, known)
    preprocessing = Preprocessing(crop_ratio=variant.crop_ratio).changed(file.stated)
    return LoadedModel(model.eval(), known, class_names(count, file.classes), preprocessing, model.classes)
