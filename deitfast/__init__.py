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
    "AccelerationReport": "deitfast.model.acceleration",
    "accelerate": "deitfast.model.acceleration",
    "DeitfastError": "deitfast.errors",
    "DeiT": "deitfast.model.deit",
    "create_model": "deitfast.model.factory",
    "LoadedModel": "deitfast.model.factory",
    "load_model": "deitfast.model.factory",
    "Classifier": "deitfast.use.predict",
    "get_model": "deitfast.use.predict",
    "inference_model": "deitfast.use.predict",
    "list_models": "deitfast.model.zoo",
    "Recipe": "deitfast.recipe",
    "Result": "deitfast.training.train",
    "run": "deitfast.training.launch",
    "train": "deitfast.training.launch",
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
    if name not in _HOMES:
        raise AttributeError(f"module 'deitfast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
