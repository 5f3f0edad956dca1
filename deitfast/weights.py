"""The old path of `deitfast.model.weights`, and of `load_model`, which is in `deitfast.model.factory`."""

from deitfast.model.factory import LoadedModel, load_model
from deitfast.model.weights import load_weights, published_weights, read_state_dict, read_weights, save_weights

__all__ = [
    "LoadedModel", "load_model", "load_weights", "published_weights", "read_state_dict", "read_weights", "save_weights",
]  # fmt: skip
