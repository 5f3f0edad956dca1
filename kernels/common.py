"""What every op shares: how it is declared, where it runs, what it accepts, how a kernel is launched."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""True where Triton runs kernels in its interpreter; decided, as Triton does, when the kernels are imported."""

STANDS_FOR = 0
"""Architecture of the GPU that the CPU stands for, where a Triton driver runs compiled kernels on it; else 0."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


_UNFUSED = (
    "Run the model unfused: accelerate(model).undo(), or create_model(..., fused=False) for one of deitfast's own"
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", covariant=True)


class Op(Protocol[Arguments, Result]):
    """A torch.library op, which is called as the function that it was made of."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result: ...

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[[Any, Any, Any], None]
    ) -> None: ...


def op(name: str) -> Callable[[Callable[Arguments, Result]], Op[Arguments, Result]]:
    """Decorator: the function as the op `deitfast::name`, on CPU and CUDA, which mutates none of its inputs.

    The function is its own fake implementation: on tensors without data it takes its eager branch, which computes
    shapes, strides and dtypes as on data. A branch that reads values must ask `has_data` first.

    Forward-mode differentiation is refused, which an op would pass over (its tangents would come out as zeros), and so
    is backward where no formula is registered: for an op that is itself a backward that is differentiating twice.
    """

    def declare(function: Callable[Arguments, Result]) -> Op[Arguments, Result]:
        @functools.wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if forward_ad._current_level >= 0:  # type: ignore[attr-defined]
                raise NotImplementedError(f"deitfast::{name} has no forward-mode derivative (jvp). {_UNFUSED}")
            return function(*args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=())
        qualified = f"deitfast::{name}"
        made = torch.library.custom_op(qualified, run, mutates_args=(), device_types="cuda", schema=schema)
        # custom_op keeps torch.compile from looking into its implementations, for which the first call imports
        # torch._dynamo: 1.3 s of every process. On CPU tensors there is nothing but PyTorch to be seen.
        torch.library.impl(qualified, "cpu", run)
        made.register_fake(run)

        def refuse(ctx: Any, *gradients: Any) -> NoReturn:
            raise NotImplementedError(f"deitfast::{name} cannot be differentiated. {_UNFUSED}")

        made.register_autograd(refuse)
        return cast(Op[Arguments, Result], made)

    return declare


def has_data(x: Tensor) -> bool:
    """Whether x has values, not only a shape: false under torch.compile, torch.export and on the meta device."""
    return not (isinstance(x, FakeTensor) or x.is_meta)


def runs_triton(x: Tensor) -> bool:
    """Whether an op on `x` launches its Triton kernels or takes the eager implementation, which is for the CPU."""
    return x.is_cuda or INTERPRETED or STANDS_FOR > 0 if has_data(x) else _recorder is not None


def architecture(x: Tensor) -> int:
    """Key into the launch tables: 80, 90 or 100; 0, the safe default, for anything else and for the interpreter.

    Triton compiles for the exact chip; the table only picks tile sizes, so 86 and 89 use the table's default because
    their shared memory is smaller than an A100's.
    """
    if _recorder is not None and not has_data(x):
        return _recorder.arch
    if not x.is_cuda:
        return STANDS_FOR
    major, minor = torch.cuda.get_device_capability(x.device)
    return {(8, 0): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get((major, minor), 0)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast, where enabled for the device of `x`, gives a matrix product; else None."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Any]:
    """The tensors in the autocast dtype, as linear casts its operands; unchanged where autocast is off."""
    dtype = autocast_dtype(x)
    return [tensor if tensor is None or dtype is None else tensor.to(dtype) for tensor in tensors]


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a backward, so that a forward writes what only the backward reads."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def needed_gradients(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient for each input of an op's autograd formula, None in place of those that autograd did not ask for."""
    return tuple(grad if needed else None for grad, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def rows(x: Tensor) -> Tensor:
    """x (..., D) as (M, D): a view wherever the strides allow one; M may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def check_dtypes(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors share one supported dtype and device: TypeError for dtypes, ValueError for devices."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if INTERPRETED and tensor.dtype == torch.bfloat16 and not tensor.is_cuda:
            raise TypeError(
                f"{op}: {name} is bfloat16, which Triton's interpreter multiplies wrongly; use float16 or float32"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; supported are bfloat16, float16 and float32")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype} but {first_name} is {first.dtype}; cast one of them")
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first_name} on {first.device}; move one of them")


def check_same_or_fp32(op: str, reference_name: str, reference: Tensor, **tensors: Tensor) -> None:
    """Raise TypeError unless each tensor has the reference's dtype or is fp32, ValueError on another device."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (reference.dtype, torch.float32):
            raise TypeError(
                f"{op}: {name} is {tensor.dtype} but {reference_name} is {reference.dtype}; cast {name} to that or fp32"
            )
        if tensor.device != reference.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device} but {reference_name} on {reference.device}; move one of them"
            )


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError naming both shapes unless `tensor.shape == expected`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}")


def check_last_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError naming shape and strides unless the last dimension is contiguous."""
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; "
            "its last dimension must be contiguous (call .contiguous())"
        )


# Launches ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch-table entry: constexpr tile sizes by name, plus Triton's launch options.

    fp_fusion: whether a product may be added without being rounded first. programs: at most so many, which share the
    work in a loop, each with its own part of a sum; all of them should fit an H100 at once. 0: as the sizes ask.
    """

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True
    programs: int = 0

    def options(self) -> dict[str, Any]:
        """The options as keywords of a launch and of a compilation."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.fp_fusion else {**options, "enable_fp_fusion": False}

    def __str__(self) -> str:
        tiles = " ".join(f"{name}={value}" for name, value in self.tiles.items())
        programs = f" programs={self.programs}" if self.programs else ""
        return f"{tiles} warps={self.num_warps} stages={self.num_stages}{programs}"


@dataclass(frozen=True)
class Recorded:
    """A launch that `record` wrote down. arguments: all of the kernel's, by name; tensors have no data."""

    kernel: Any
    arguments: Mapping[str, Any]
    entry: Launch


class _Recorder(NamedTuple):
    arch: int
    launches: list[Recorded]


_recorder: _Recorder | None = None


@contextlib.contextmanager
def record(arch: int) -> Iterator[list[Recorded]]:
    """Inside, ops on tensors without data write down in the list what they would launch on a chip of that table.

    So ops need no GPU, and no memory, to tell which kernels they consist of. Not for several threads at once.
    """
    global _recorder
    if INTERPRETED:
        raise RuntimeError("record: TRITON_INTERPRET=1 is set, and the interpreter has launches of its own; unset it")
    outer, _recorder = _recorder, _Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = outer


def launch(kernel: Any, grid: tuple[int, ...], entry: Launch, **arguments: Any) -> None:
    """Launch a Triton kernel on the device of its first argument, a tensor or a descriptor; the only way to do so.

    arguments: the kernel's, by name, but the tiles of the `entry`.
    """
    first = next(iter(arguments.values()))
    first = first.base if isinstance(first, TensorDescriptor) else first
    if not has_data(first):
        assert _recorder is not None
        _recorder.launches.append(Recorded(kernel, {**arguments, **entry.tiles}, entry))
        return
    with torch.cuda.device_of(first):
        kernel[grid](**arguments, **entry.tiles, **entry.options())


def on_16_bytes(x: Tensor) -> bool:
    """Whether x begins at a multiple of 16 bytes, as every allocation does."""
    return (x.data_ptr() if has_data(x) else x.storage_offset() * x.element_size()) % 16 == 0


def aligned(x: Tensor) -> bool:
    """Whether a 2-D tensor has what TMA needs: base and rows on 16 bytes, rows that do not overlap, some elements."""
    rows_fit = x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
    return x.numel() > 0 and rows_fit and on_16_bytes(x)
