"""Models by name: fresh, or with weights from anywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from deitfast.errors import DeitfastError
from deitfast.model.class_names import class_names
from deitfast.model.convert import to_ours
from deitfast.model.deit import DeiT
from deitfast.model.fused import fuse
from deitfast.model.weights import fill, layer_scale_of, load_weights, published_weights, read_weights, shapes_of
from deitfast.model.zoo import find_variant, recognise


def create_model(
    name: str,
    pretrained: bool | str = False,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    drop_path: float = 0.0,
    constant_drop_path: bool = False,
    layer_scale: float | None = None,
    reset_head: bool = False,
    depth: int | None = None,
    fused: bool | None = None,
) -> DeiT:
    """A DeiT by timm's name.

    pretrained: False for fresh weights; True for the authors' published ones (downloaded once and checked against the
        hash in their name); a path to a .safetensors or .pth file otherwise.
    num_classes, image_size, layer_scale: 1000 and the name's own where None. Position embeddings of pretrained weights
        are interpolated to the image size.
    reset_head: start the heads of a pretrained model at zero, whatever the file's class count.
    depth: blocks; None for the name's own. Fewer make another, smaller model: for smoke tests.
    fused: True runs the blocks through the ops of `deitfast.kernels`, False in eager PyTorch; None decides by where the
        model runs: fused on CUDA, eager on CPU.
    Raises DeitfastError for an unknown name and for a weight file that is another model's.
    """
    variant = find_variant(name)
    model = DeiT(
        width=variant.width,
        depth=variant.depth if depth is None else depth,
        num_heads=variant.heads,
        image_size=image_size or variant.image_size,
        patch_size=variant.patch_size,
        num_classes=1000 if num_classes is None else num_classes,
        drop_path=drop_path,
        constant_drop_path=constant_drop_path,
        layer_scale=variant.layer_scale if layer_scale is None else layer_scale,
        class_position=variant.class_position,
        distilled=variant.distilled,
    )
    if pretrained:
        path = published_weights(name) if pretrained is True else pretrained
        load_weights(model, path, name=name, reset_head=reset_head)
    if fused or (fused is None and torch.cuda.is_available()):
        fuse(model, on_cpu=bool(fused))
    return model


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what is needed to use it. crop_ratio: what its weights are evaluated at."""

    model: DeiT
    name: str
    classes: tuple[str, ...]
    crop_ratio: float


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
    published ones of `name`. num_classes, image_size: the file's where None, but `name`'s image size where a name is
    given. Raises DeitfastError for weights that do not fit.
    """
    if weights is None:
        if name is None:
            raise DeitfastError("neither a model nor weights. Give a model's name (`deitfast models`) or a weight file")
        weights = published_weights(name)
    file = read_weights(weights, ema=ema)
    state = to_ours(file.tensors)
    shapes = {key: shape for key, shape in shapes_of(state).items() if shape}  # a scalar tells nothing
    known = name or file.model or recognise(shapes)
    if known is None:
        raise DeitfastError(f"{file.path} holds weights of no model of the list. Give the model's name")
    variant = find_variant(known)
    if name is None and image_size is None and len(shapes.get("pos_embed", ())) == 3:
        patches = shapes["pos_embed"][1] - variant.prefix_positions
        image_size = math.isqrt(max(patches, 1)) * variant.patch_size
    classes = num_classes or (shapes["head.weight"][0] if "head.weight" in shapes else 1000)
    model = create_model(
        known, num_classes=classes, image_size=image_size, layer_scale=layer_scale_of(shapes), fused=fused
    )
    fill(model, file, state, known)
    return LoadedModel(model.eval(), known, class_names(classes, file.classes), variant.crop_ratio)
