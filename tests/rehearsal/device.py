"""Builds device.cpp for the torch of this interpreter, loads it before torch, and gives its functions."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent.parent / "build" / "rehearsal"
COMPILER = os.environ.get("CXX", "g++")


def torch_folder() -> Path:
    """Where torch is installed; does not import it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def torch_version() -> dict[str, str | None]:
    """torch/version.py, without importing torch."""
    names: dict[str, str | None] = {}
    exec((torch_folder() / "version.py").read_text(), names)
    return names


def build() -> Path:
    """The library for this torch, built where there is none of this source yet (some ten seconds)."""
    torch, source = torch_folder(), HERE / "device.cpp"
    key = hashlib.sha256(source.read_bytes() + str(torch_version()["__version__"]).encode()).hexdigest()[:16]
    library = BUILT / f"device-{key}.so"
    if library.exists():
        return library
    BUILT.mkdir(parents=True, exist_ok=True)
    part = library.with_suffix(f".{os.getpid()}")
    include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    subprocess.run(
        [COMPILER, "-shared", "-fPIC", "-O1", "-w", "-std=c++20", *include, str(source), f"-L{torch}/lib",
         "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib", "-o", str(part)],
        check=True,
    )  # fmt: skip
    part.rename(library)  # whole or not there, whoever else builds it
    return library


def load() -> ctypes.CDLL:
    """The device's functions. torch asks once whether there is CUDA, so this comes before torch is imported."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: the pretended device must be there before")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    device = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    numbers = "stream_get stream_new copies_to_device copies_to_host bytes_allocated bytes_peak"
    for name in numbers.split():
        getattr(device, name).restype = ctypes.c_int64
    device.stream_set.argtypes = [ctypes.c_int64, ctypes.c_int]
    return device
