"""deitfast: a kernel-fused training engine for DeiT vision transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deitfast.errors import DeitfastError
    from deitfast.model.acceleration import AccelerationReport, accelerate
    from deitfast.model.deit import DeiT
    from deitfast.model.factory import LoadedModel, create_model, load_model
    from deitfast.model.zoo import list_models
    from deitfast.recipe import Recipe
    from deitfast.training.launch import run, train
    from deitfast.training.train import Result
    from deitfast.use.predict import Classifier, get_model, inference_model

__version__ = "0.1.0"

# Imported on first use, so that `deitfast --help` and `deitfast models` never wait for torch.
_HOMES = {
    "deitfast.errors": ("DeitfastError",),
    "deitfast.model.acceleration": ("AccelerationReport", "accelerate"),
    "deitfast.model.deit": ("DeiT",),
    "deitfast.model.factory": ("LoadedModel", "create_model", "load_model"),
    "deitfast.model.zoo": ("list_models",),
    "deitfast.recipe": ("Recipe",),
    "deitfast.training.launch": ("run", "train"),
    "deitfast.training.train": ("Result",),
    "deitfast.use.predict": ("Classifier", "get_model", "inference_model"),
}
__all__ = [
    "AccelerationReport",
    "Classifier",
    "DeiT",
    "DeitfastError",
    "LoadedModel",
    "Recipe",
    "Result",
    "accelerate",
    "create_model",
    "get_model",
    "inference_model",
    "list_models",
    "load_model",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'deitfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
