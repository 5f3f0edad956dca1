"""The kernels on the pretended device: launches are bound as Triton binds them, values are the eager implementations'.

Each op runs its CUDA side, so that whatever Python a launch needs is run with the strides and dtypes of the moment;
a launch is bound (TMA descriptors included), checked and noted in LAUNCHES instead of being compiled and run. Then the
op runs again on the host's view of the same memory, where it takes its eager implementation.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from tests.rehearsal.memory import DEVICE, on_host, wrap  # before torch

import torch  # isort: skip
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.rehearsal.capture import ACTIVE, REPLAYED


@dataclass(frozen=True)
class Launch:
    """One launch. first: whether its specialisation was not there before, so that Triton would compile it now."""

    kernel: str
    stream: int
    thread: str
    captured: bool
    first: bool


LAUNCHES: list[Launch] = []


class Driver(DriverBase):
    """Triton's driver of an H100."""

    def __init__(self) -> None:
        self.get_current_device = DEVICE.device_get
        self.get_current_stream = DEVICE.stream_get

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", DEVICE.device_get())

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def bind(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of JITFunction.run: what it does up to the compilation."""
    kwargs |= {"debug": False, "instrumentation_mode": ""}
    device = DEVICE.device_get()
    _, key_cache, _, _, binder = self.device_caches[device]
    bound, specialization, options = binder(*args, **kwargs)
    name = self.fn.__name__
    for argument, value in bound.items():
        value = value.base if isinstance(value, TensorDescriptor) else value
        if isinstance(value, torch.Tensor):
            assert value.is_cuda, f"{name}: {argument} is on the CPU"
            assert value.device.index == device, f"{name}: {argument} is on {value.device}, launched on {device}"
    shape = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
    assert 0 < shape[0] < 2**31 and min(shape[1:]) > 0 and max(shape[1:]) < 2**16, f"{name}: grid {shape}"  # noqa: PT018
    key = compute_cache_key(key_cache, specialization, options)
    seen: set[Any] = self.__dict__.setdefault("rehearsed", set())
    captured, first = bool(ACTIVE), (device, key) not in seen
    assert not (captured and first), f"{name}: first launched in a capture, so compiled and loaded there"
    seen.add((device, key))
    LAUNCHES.append(Launch(name, DEVICE.stream_get(device), threading.current_thread().name, captured, first))


def install() -> None:
    """Put all of this in place of the kernels' launches, for the rest of the process."""
    import deitfast.kernels
    from deitfast.kernels import optimizer
    from deitfast.verification import process

    driver.set_active(Driver())
    JITFunction.run = bind  # type: ignore[method-assign]
    for found in pkgutil.iter_modules(deitfast.kernels.__path__):
        module = importlib.import_module(f"deitfast.kernels.{found.name}")
        for op in [value for value in vars(module).values() if type(value).__name__ == "CustomOpDef"]:
            launch = op._backend_fns.get("cuda")
            if launch is not None and not hasattr(launch, "rehearsed"):
                op._backend_fns["cuda"] = _both(launch)
    optimizer.update_triton = _update(optimizer.update_triton)
    # Another process would have no pretended device.
    process.answers = lambda module, job: importlib.import_module(module).work(job)


def _both(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op's CUDA side, for its launches, then its CPU side, for the values."""

    @functools.wraps(op)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_cuda]
        launched = None if REPLAYED else op(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, on_host, (args, kwargs))
        out = tree_map_only(torch.Tensor, lambda x: wrap(x, given[0].device.index), op(*args, **kwargs))
        if not REPLAYED:
            assert _facts(launched) == _facts(out), f"{op.__name__}: a GPU gets {_facts(launched)}, a CPU {_facts(out)}"
        return out

    run.rehearsed = True  # type: ignore[attr-defined]
    return run


def _facts(tree: Any) -> list[Any]:
    """Shape, dtype, device and strides of each tensor."""
    return [
        (x.shape, x.dtype, x.device, x.stride()) if isinstance(x, torch.Tensor) else type(x) for x in tree_leaves(tree)
    ]


def _update(update: Callable[..., None]) -> Callable[..., None]:
    """The optimiser's kernels, which are no op of the dispatcher's."""

    def run(optimizer: Any, buffers: Any, scalars: torch.Tensor) -> None:
        from deitfast.kernels.optimizer_eager import update_eager
        from deitfast.kernels.optimizer_kernels import Scalars

        assert scalars.is_cuda
        written = [x for x in vars(buffers).values() if isinstance(x, torch.Tensor)]

        def hosted(one: Any) -> Any:
            """A dataclass with its tensors on the host: the same memory."""
            own = {f.name: getattr(one, f.name) for f in fields(one)}
            return replace(one, **tree_map_only(torch.Tensor, on_host, own))

        on_cpu = replace(hosted(buffers), segments=hosted(buffers.segments))

        def eager() -> None:
            update_eager(optimizer, on_cpu, Scalars(*on_host(scalars).tolist()))

        with _disable_current_modes():
            update(optimizer, buffers, scalars)
        for capture in ACTIVE:
            capture.record("update", eager, written)
        if not ACTIVE:
            eager()

    return run
