"""A Triton driver without a GPU: kernels are compiled for a CUDA architecture, and their PTX runs in the machine.

    with driver.emulated(90) as gpu:   # sm_90: TMA, wgmma, mbarrier; 80: mma.sync, cp.async
        kernel[grid](cpu_tensor, ...)
    gpu.launches                       # what ran

Compiled kernels lie in Triton's own cache, by source, Triton's version and architecture; the binary is the PTX, so
ptxas does not run. Arguments become kernel parameters as in triton/backends/nvidia/driver.py, and a tensor map is made
under the conditions that the CUDA driver documents for cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

from tests.ptx.assembler import Program, assemble
from tests.ptx.binding import TENSOR_MAP_MAGIC, TensorMap
from tests.ptx.machine import Launch, Options, run
from tests.ptx.parser import PtxError, parse

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "fp64": "d",
}  # fmt: skip
_MAP_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}
"""CUtensorMapDataType -> bytes."""

Memory = list[tuple[int, int]]
"""(address, bytes) of what a launch may touch."""


class PtxBackend(CUDABackend):
    """Triton's own compiler, which stops at PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Callable], *args: Any) -> None:
        super().add_stages(stages, *args)
        del stages["cubin"]

    @functools.cache  # noqa: B019
    def hash(self) -> str:
        return f"ptx-{super().hash()}"


def tensor_map(
    address: int, swizzle: int, element: int, kind: int, block: Any, shape: Any, strides: Any, nan_fill: bool
) -> bytes:
    """A tensor map of 128 bytes; PtxError where the CUDA driver would refuse it.

    shape, strides: in elements, the outermost dimension first; block: rows, columns of a box likewise.
    Source of the conditions: CUDA driver API, cuTensorMapEncodeTiled.
    """
    rank = len(block)
    box, dims = [int(x) for x in reversed(block)], [int(x) for x in reversed(shape)]
    steps = [element, *(element * int(x) for x in reversed(strides[:-1]))]
    inner = box[0] * element
    conditions = {
        f"element type {kind} of {element} bytes": _MAP_ELEMENT_BYTES.get(kind) == element,
        f"base 0x{address:x} is no multiple of 16": address % 16 == 0,
        f"rank {rank}, shape {dims}": 1 <= rank <= 5 and len(dims) == rank,
        f"shape {dims}": all(0 < d <= 1 << 32 for d in dims),
        f"strides of {steps[1:]} bytes": all(s % 16 == 0 and 0 <= s < 1 << 40 for s in steps[1:]),
        f"box {box}": all(0 < b <= 256 for b in box),
        f"rows of {inner} bytes, swizzle {swizzle}": inner % 16 == 0 and (not swizzle or inner <= 16 << swizzle),
    }
    if broken := [what for what, holds in conditions.items() if not holds]:
        raise PtxError(f"tensor map: {'; '.join(broken)}")
    t = TensorMap(TENSOR_MAP_MAGIC, address, rank=rank, element=element, swizzle=swizzle, nan_fill=nan_fill)
    for i in range(rank):
        t.dim[i], t.stride[i], t.box[i] = dims[i], steps[i], box[i]
    return bytes(t).ljust(128, b"\0")


class Utils:
    """What Triton asks of the CUDA driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        """Module and function, for which the PTX stands, registers, spills, largest number of threads."""
        return binary.decode(), binary.decode(), 0, 0, 1024


@functools.cache
def program_of(ptx: str) -> Program:
    return assemble(parse(ptx))


class Launcher:
    """Runs one compiled kernel: turns its arguments into a parameter buffer."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.num_ctas = metadata.name, metadata.num_ctas
        self.signature = list(source.signature.values())
        self.maps = list(getattr(metadata, "tensordesc_meta", None) or [])
        self.scratch = metadata.global_scratch_size or metadata.profile_scratch_size

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, stream: int, ptx: str, *args: Any) -> None:
        gpu = triton.runtime.driver.active
        (num_warps, _, shared), _, _, _, *arguments = args
        grid = grid_x, grid_y, grid_z
        if self.num_ctas != 1 or self.scratch:
            raise PtxError(f"{self.name}: not modelled: clusters of CTAs, or scratch in global memory")
        if not (grid_y < 1 << 16 and grid_z < 1 << 16 and grid_x * grid_y * grid_z < 1 << 31):  # an int's product
            raise PtxError(f"{self.name}: grid {grid}")
        if 0 in grid:
            return
        memory: Memory = []
        program = program_of(gpu.change(ptx))
        parameters = self.pack(program, arguments, memory)
        if program.kernel.threads not in (0, 32 * num_warps):
            raise PtxError(f"{self.name}: {program.kernel.threads} threads in the PTX, {32 * num_warps} at launch")
        gpu.launches.append(run(program, grid, num_warps, shared, parameters, memory, gpu.options))

    def pack(self, program: Program, arguments: list[Any], memory: Memory) -> bytes:
        """The parameter buffer. Adds what the arguments point to to `memory`."""
        maps = iter(self.maps)
        parts = [
            part
            for kind, value in zip(self.signature, arguments, strict=True)
            for part in self.expand(kind, value, maps, memory)
        ]
        parts += [bytes(8), bytes(8)]  # two pointers to scratch memory, which no kernel here has
        slots = list(program.kernel.parameters.values())
        if [len(part) for part in parts] != [size for _, size in slots]:
            raise PtxError(f"{self.name}: arguments of {[len(p) for p in parts]} bytes for parameters of {slots}")
        packed = b""
        for (offset, _), part in zip(slots, parts, strict=True):
            packed += b"\0" * (offset - len(packed)) + part
        return packed

    def expand(self, kind: Any, value: Any, maps: Iterator[Any], memory: Memory) -> list[bytes]:
        """An argument as kernel parameters: descriptors and tuples become several, constants none."""
        if isinstance(kind, tuple):
            return [x for k, v in zip(kind, value, strict=True) for x in self.expand(k, v, maps, memory)]
        if kind == "constexpr":
            return []
        if not kind.startswith("tensordesc"):
            return [_scalar(kind, value, memory)]
        meta = next(maps)
        if meta is None:
            raise PtxError(f"{self.name}: not modelled: a descriptor without a tensor map")
        _touch(value.base, memory)
        packed = tensor_map(
            value.base.data_ptr(), meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
            meta["block_size"], value.shape, value.strides, value.padding == "nan",
        )  # fmt: skip
        return [packed, *(struct.pack("<i", x) for x in value.shape), *(struct.pack("<q", x) for x in value.strides)]


def _touch(tensor: torch.Tensor, memory: Memory) -> None:
    storage = tensor.untyped_storage()
    memory.append((storage.data_ptr(), storage.nbytes()))


def _scalar(kind: str, value: Any, memory: Memory) -> bytes:
    if kind.startswith("*"):
        if value is None:
            return bytes(8)
        _touch(value, memory)
        return struct.pack("<Q", value.data_ptr())
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    return struct.pack("<" + _FORMATS[kind], value)


class EmulatedGpu(DriverBase):
    """Presents itself to Triton as one CUDA device of the given architecture.

    change: what is done to a kernel's PTX before it runs.
    """

    launcher_cls = Launcher

    def __init__(self, arch: int, options: Options, change: Callable[[str], str]) -> None:
        super().__init__()
        self.arch, self.options, self.change = arch, options, change
        self.utils = Utils(arch)
        self.launches: list[Launch] = []

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A device number for each architecture: Triton keeps compiled kernels by it."""
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise PtxError("nothing is timed here")


@contextlib.contextmanager
def emulated(arch: int, change: Callable[[str], str] = str, **options: Any) -> Iterator[EmulatedGpu]:
    """Within, Triton launches kernels on CPU tensors as code for `arch` (80 or 90). options: fields of Options."""
    config, backends = triton.runtime.driver, triton.backends.backends
    device, backend = EmulatedGpu(arch, Options(**options), change), backends["nvidia"]
    before = config._active
    config.set_active(device)
    backends["nvidia"] = replace(backend, compiler=PtxBackend)
    try:
        yield device
    finally:
        backends["nvidia"] = backend
        config._active = before
