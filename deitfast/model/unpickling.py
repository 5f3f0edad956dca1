"""PyTorch files read without running anything in them: what is no tensor becomes a stand-in that does nothing.

Training programs keep their arguments, logs and metrics beside the weights, of classes that torch's safe unpickler
refuses and that need not even be installed here. For such a file the pickle is read again by an unpickler that finds
three kinds of names: what torch's own safe list has; the harmless ones below, each replaced by `StandIn`, which takes
whatever it is given and does nothing; and no others, so nothing else is ever called.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch._weights_only_unpickler import _get_allowed_globals

_HARMLESS = (
    # The standard library's plain values, and numpy's scalars among metrics.
    "pathlib", "collections", "datetime", "decimal", "enum", "uuid", "argparse", "types.SimpleNamespace", "numpy",
    *(f"builtins.{name}" for name in (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple",
    )),
    "typing", "_codecs.encode", "copyreg._reconstructor", "functools.partial",
    # Configurations and logs of training programs and libraries.
    "mmengine", "mmcv", "mmcls", "mmpretrain", "mmdet", "mmseg", "addict", "omegaconf", "hydra", "yacs", "fvcore",
    "iopath", "ml_collections", "easydict", "munch", "submitit", "lightning", "lightning_fabric", "lightning_utilities",
    "pytorch_lightning", "torchmetrics", "transformers", "accelerate", "datasets", "timm", "torchvision", "tokenizers",
    "wandb", "detectron2", "composer", "ignite", "catalyst", "torch.optim", "torch.amp", "torch.cuda.amp", "torch.nn",
    # Classes of the program itself, which nobody else has.
    "__main__", "__mp_main__", "main", "train", "engine", "utils", "util", "misc", "config", "configs", "models", "src",
)  # fmt: skip
"""Modules (with all below) and single names whose objects are put in place by stand-ins."""


class StandIn:
    """Takes the place of an object of any class: it can be made, filled and called, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _ignore(self, *values: Any) -> None:
        """What a pickle fills an object with."""

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Finds torch's own safe names and stand-ins. torch.load subclasses it and adds the storages.

    Pickle's version in Python, because that in C has no place at which the filling of objects could be checked: a
    pickle may ask to set attributes of a class that it found.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    stack: list[Any]

    def load_build(self) -> None:
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError(f"GLOBAL {self.stack[-2]!r} with attributes set")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        full = f"{_PYTHON_2.get(module, module)}.{name}"  # the names of the protocol that torch.save writes
        known = _get_allowed_globals()
        if full in known:
            return known[full]
        if any(full == harmless or full.startswith(f"{harmless}.") for harmless in _HARMLESS):
            return StandIn
        raise pickle.UnpicklingError(f"GLOBAL {full}")


_PICKLE_MODULE: Any = SimpleNamespace(
    __name__="deitfast", Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load()
)


def load(path: Path) -> Any:
    """What a PyTorch file holds, on the CPU: torch's safe unpickler first, then the one with stand-ins.

    Raises what torch.load raises, pickle.UnpicklingError for a file with any other name above all.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks on pickles of other versions
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if _is_torchscript(path):  # which torch.load would hand to TorchScript otherwise
                raise
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE_MODULE)


def refused_name(error: Exception) -> str | None:
    """The class or function that a refused pickle asked for. torch's own first line recommends to load it anyway."""
    found = re.search(r"GLOBAL (\S+)|(?:class|type|function) (\S+)", str(error))
    return next(filter(None, found.groups())) if found else None


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
