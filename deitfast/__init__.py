"""deitfast: a kernel-fused training engine for DeiT vision transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deitfast.acceleration import AccelerationReport, accelerate
    from deitfast.errors import DeitfastError
    from deitfast.model import DeiT, create_model
    from deitfast.predict import Classifier, get_model, inference_model
    from deitfast.recipe import Recipe
    from deitfast.zoo import list_models

__version__ = "0.1.0"

# Imported on first use, so that `deitfast --help` and `deitfast models` never wait for torch.
_HOMES = {
    "AccelerationReport": "deitfast.acceleration",
    "accelerate": "deitfast.acceleration",
    "DeitfastError": "deitfast.errors",
    "DeiT": "deitfast.model",
    "create_model": "deitfast.model",
    "Classifier": "deitfast.predict",
    "get_model": "deitfast.predict",
    "inference_model": "deitfast.predict",
    "list_models": "deitfast.zoo",
    "Recipe": "deitfast.recipe",
}
__all__ = [
    "AccelerationReport",
    "Classifier",
    "DeiT",
    "DeitfastError",
    "Recipe",
    "accelerate",
    "create_model",
    "get_model",
    "inference_model",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deitfast' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
