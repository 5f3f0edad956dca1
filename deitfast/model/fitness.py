"""Whether the kernels may stand in for a block: asked before a block is fused, and again in every forward.

The kernels read a block's weights and never call its modules. So a module that is replaced (LoRA, quantisation,
pruning), hooked, patched or switched to dropout after the model was fused would have no effect, and nobody would be
told. `Fusible.steps_aside` compares each call with the last examination: types and identities of the modules inside,
their hooks and forwards, the few settings that change the result, the weights' dtypes. Where something differs the
block is examined again, and what the kernels cannot do runs in the library's own forward, told once.

Under torch.compile the answer is a constant of the graph: what Dynamo guards (the modules' types) asks again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what others want called around it."""
_PROBABILITIES = ("p", "dropout", "attention_dropout")
_SETTINGS = (
    *_PROBABILITIES, "approximate", "_fast_norm", "num_heads", "num_attention_heads", "head_dim", "scale", "scaling",
    "add_zero_attn", "batch_first",
)  # fmt: skip
"""Attributes of modules inside a block, in any of the libraries, on which it depends what the block computes."""
RECORDERS = "transformers.utils.output_capturing"
"""The hooks by which transformers records attention weights: adapters send the calls that want these elsewhere."""


@dataclass(frozen=True)
class _Examination:
    """What a block looked like, and the reason why the kernels cannot stand in for it then, or None.

    attributes: the modules' own dicts, in the order of `modules`, in which their children, hooks, weights and settings
    lie: to be read without the search that an attribute of a module costs.
    """

    modules: list[nn.Module | None]
    attributes: list[dict[str, Any]]
    types: list[type]
    forwards: dict[type[nn.Module], Any]
    hooks: list[tuple[int, ...]]
    settings: list[tuple[dict[str, Any], str, Any]]
    foreign: list[tuple[Any, str, Any]]
    weights: list[tuple[dict[str, Any], torch.dtype]]
    problem: str | None


class Fusible:
    """Mixed into a block's class: `steps_aside` says whether a call belongs to the block's own forward."""

    original: ClassVar[type[nn.Module]]
    """The class whose forward that is."""
    dropouts: ClassVar[tuple[str, ...]] = ()
    """Dropout probabilities, by their paths from the block: `attn.attn_drop.p`."""
    settings: ClassVar[tuple[str, ...]] = ()
    """What else, beyond `_SETTINGS` of its modules, a block depends on, by paths."""
    notes: ClassVar[tuple[str, ...]] = ()
    """What a user of such fused blocks should know."""

    @staticmethod
    def problems(block: Any) -> Iterator[str]:
        """Why the kernels cannot stand in for `block`, dropout left aside; nothing if they can."""
        raise NotImplementedError

    def steps_aside(self, x: Any) -> bool:
        """Whether this call must run the block's own forward; the reason is told the first time."""
        if torch.compiler.is_dynamo_compiling():
            return _steps_aside_in_graph(self)
        if not isinstance(x, Tensor):
            _tell_once("torch.fx and its like trace PyTorch's own operations")
            return True
        if is_wrapper(x):  # a DTensor, a nested tensor
            return True
        return _steps_aside(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at its own modules.
        return {name: value for name, value in self.__dict__.items() if name != "_examination"}


def _steps_aside_in_graph(block: Fusible) -> bool:
    return _steps_aside(block)


# What torch.compiler.assume_constant_result does, which would import all of Dynamo with this module.
_steps_aside_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _steps_aside(block: Any) -> bool:
    if reason := _surroundings():
        _tell_once(reason)
        return True
    found: _Examination | None = block.__dict__.get("_examination")
    if found is None or _differs(block, found):
        before, found = found, examine(block)
        if found.problem and (before is None or before.problem != found.problem):
            _tell(found.problem)
    return found.problem is not None


_told: set[str] = set()


def _tell_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        _tell(reason)


def _tell(reason: str) -> None:
    # Python shows the same text once, so twelve blocks that changed alike make one line.
    warnings.warn(f"deitfast: a fused block runs its unfused forward: {reason}", stacklevel=5)


def _surroundings() -> str | None:
    """What around a call asks for PyTorch's own operations, whatever the block looks like."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms go through PyTorch's own operations"
    if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
        return "forward-mode differentiation goes through PyTorch's own operations"
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "TorchScript and ONNX know PyTorch's own operations only"
    if torch_module._has_any_global_hook():
        return "hooks on all modules are set (torch.nn.modules.module.register_module_*_hook)"
    return None


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is made of others (DTensor, quantised weights): an op here would not see those."""
    kind = type(tensor)
    return kind is not Tensor and kind is not nn.Parameter and hasattr(kind, "__tensor_flatten__")


def _children(block: Any, attributes: list[dict[str, Any]]) -> list[nn.Module | None]:
    """The children of a block, then those of each module inside it."""
    found = list(block._modules.values())
    for inside in attributes:
        if inside["_modules"]:
            found += inside["_modules"].values()
    return found


def _hooks(inside: dict[str, Any]) -> tuple[int, ...]:
    """Numbers of all hooks of a module: none is ever given twice."""
    return tuple(number for kind in HOOKS for number in inside[kind])


def _differs(block: Any, found: _Examination) -> bool:
    """Whether anything that an examination looks at is no longer as `found`; microseconds, in every forward."""
    attributes = found.attributes
    if _children(block, attributes) != found.modules or list(map(type, found.modules)) != found.types:
        return True
    if "forward" in block.__dict__ or [1 for inside in attributes if "forward" in inside]:
        return True
    if [1 for cls, forward in found.forwards.items() if cls.forward is not forward]:
        return True
    hooked = [
        inside
        for inside in attributes
        if inside["_forward_hooks"]
        or inside["_forward_pre_hooks"]
        or inside["_backward_hooks"]
        or inside["_backward_pre_hooks"]
    ]
    if (hooked or any(found.hooks)) and list(map(_hooks, attributes)) != found.hooks:
        return True
    if [1 for inside, name, value in found.settings if inside.get(name) != value]:
        return True
    if any(getattr(owner, name, None) != value for owner, name, value in found.foreign):
        return True
    for inside, dtype in found.weights:
        weight = inside["_parameters"].get("weight")
        if weight is not None and (weight.dtype != dtype or is_wrapper(weight)):
            return True
    return False


def examine(block: Any) -> _Examination:
    """Look at a block that is `Fusible`, and keep what was seen for its next forward."""
    attributes: list[dict[str, Any]] = []
    modules = list(block._modules.values())
    for module in modules:  # grows meanwhile: the children of each follow
        if module is not None:
            attributes.append(module.__dict__)
            modules += module._modules.values()
    block._examination = found = _Examination(
        modules=modules,
        attributes=attributes,
        types=[type(module) for module in modules],
        forwards={type(module): type(module).forward for module in modules if module is not None},
        hooks=[_hooks(inside) for inside in attributes],
        settings=[
            (inside, name, inside[name])
            for inside in attributes
            for name in (*_SETTINGS, *(["training"] if any(inside.get(p) for p in _PROBABILITIES) else []))
            if name in inside
        ],
        foreign=[(owner, name, getattr(owner, name, None)) for owner, name in _found(block, block.settings)],
        weights=[
            (inside, weight.dtype)
            for inside in attributes
            if isinstance(weight := inside["_parameters"].get("weight"), Tensor) and weight.ndim > 1
        ],
        problem=find_problem(type(block), block, active=True),
    )
    return found


def find_problem(kind: type[Fusible], block: nn.Module, active: bool = False) -> str | None:
    """Why the kernels cannot stand in for `block` as `kind`; None if they can.

    active: dropout counts only where it is in training, not as a setting.
    """
    if "forward" in vars(block):
        return "its forward is patched"
    for name, module in block.named_modules():
        if module is block:
            continue
        if any(getattr(hook, "__module__", "") != RECORDERS for hook in hooks_of(module)):
            return f"{name} has a hook, which the kernels would never call"
        if "forward" in vars(module):
            return f"{name}'s forward is patched"
        if patch := foreign(type(module), "forward"):
            return f"{name}'s forward is {patch}'s"
    try:
        return next(kind.problems(block), None) or next(_dropouts(kind, block, active), None)
    except AttributeError as error:
        return f"not the layout this version of deitfast knows: {error}"


def dotted(cls: type) -> str:
    """Where a class lies: by this name other libraries' are known here, which are not imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def hooks_of(module: nn.Module) -> list[Any]:
    """The functions that others want called around a module."""
    return [hook for kind in HOOKS for hook in vars(module)[kind].values()]


def foreign(cls: type[nn.Module], method: str) -> str | None:
    """The module whose function was put in place of a class's method; None where it is the class's own."""
    owner = next(c for c in cls.__mro__ if method in vars(c))
    home = getattr(vars(owner)[method], "__module__", owner.__module__)
    return None if home == owner.__module__ else home


def _found(block: nn.Module, paths: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """Of the attribute at the end of each path its owner and its name."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        yield attrgetter(owner)(block), name


def _dropouts(kind: type[Fusible], block: nn.Module, active: bool) -> Iterator[str]:
    for path, (owner, name) in zip(kind.dropouts, _found(block, kind.dropouts), strict=True):
        probability = getattr(owner, name)
        if probability > 0 and (owner.training or not active):
            yield f"dropout {path.removesuffix('.p')} is {probability}; set it to 0 to fuse the block"
