"""Independent references for the tests: peers that need a little help to import on a machine without CUDA wheels."""

from __future__ import annotations

from types import ModuleType

import torch

from deitfast.data import Targets

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
)
_library: torch.library.Library | None = None


def _define_torchvision_ops() -> None:
    """Declare the schemas torchvision registers fakes for on import: its CUDA wheel cannot load beside a CPU torch."""
    global _library
    if _library is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)


def import_timm() -> ModuleType:
    _define_torchvision_ops()
    import timm

    return timm


def import_torchvision() -> ModuleType:
    _define_torchvision_ops()
    import torchvision

    return torchvision


def import_transformers() -> ModuleType:
    import_torchvision()  # which transformers takes where it is installed
    import transformers

    return transformers


def dense(targets: Targets, classes: int) -> torch.Tensor:
    """Soft targets as a float32 (m, classes) matrix, whose rows sum to 1."""
    mixture = torch.zeros(len(targets.labels), classes)
    mixture.scatter_add_(1, targets.labels[:, None], targets.lam[:, None])
    mixture.scatter_add_(1, targets.partner_labels[:, None], 1 - targets.lam[:, None])
    return (1 - targets.smoothing) * mixture + targets.smoothing / classes
