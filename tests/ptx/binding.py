"""The engine's structures as ctypes and numpy see them, and its shared library, compiled on first use."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from triton.runtime.cache import get_cache_manager

FOLDER = Path(__file__).parent / "engine"
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
WIDE, SIGNED, TRANS, READ, TRANS_B = 1, 2, 4, 8, 16
SHARED_BASE = 1024
MAX_WARPS, MAX_RACES, SPECIALS = 32, 64, 7
TENSOR_MAP_MAGIC = 0x50414D524F534E54

INSN = np.dtype(
    [
        ("op", "u2"), ("n", "u2"), ("pred", "i4"), ("negate", "u1"), ("size", "u1"), ("flags", "u1"), ("kind", "u1"),
        ("o", "i4", (6,)), ("ext", "i4"), ("line", "i4"), ("uses", "i4"), ("nuses", "i4"), ("imm", "i8"),
    ],
    align=True,
)  # fmt: skip

_i32, _u32, _i64, _u64, _p = ctypes.c_int32, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p


class Range(ctypes.Structure):
    _fields_ = [("start", _u64), ("end", _u64)]


class TensorMap(ctypes.Structure):
    _fields_ = [
        ("magic", _u64), ("base", _u64), ("dim", _u64 * 5), ("stride", _u64 * 5), ("box", _u32 * 5),
        *((name, ctypes.c_uint8) for name in ("rank", "element", "swizzle", "nan_fill")),
    ]  # fmt: skip


class Race(ctypes.Structure):
    _fields_ = [
        *((name, _i32) for name in ("kind", "line_a", "line_b", "warp_a", "warp_b")), ("address", _u64), ("cta", _i64),
    ]  # fmt: skip


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("code", _p), ("pool", _p), ("image", _p), ("slots", _i32), ("predicates", _i32), ("special", _i32 * SPECIALS),
        ("grid", _i32 * 3), ("warps", _i32), ("shared_size", _u32), ("param_size", _u32), ("param", _p),
        ("range", ctypes.POINTER(Range)), ("ranges", _i32),
        *((name, _i32) for name in ("late", "schedule", "quantum", "races", "reverse_ctas")),
        ("seed", _u32), ("max_steps", _i64), ("op_count", _p), ("race", Race * MAX_RACES),
        *((name, _i32) for name in ("nrace", "failed_line", "failed_warp", "failed_lane")),
        ("failed_cta", _i64), ("message", ctypes.c_char * 2048),
    ]  # fmt: skip


def compiler() -> str | None:
    """The C compiler: $CC, gcc or clang; None where there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))), None)


@functools.cache
def library() -> ctypes.CDLL:
    """The engine, from Triton's cache folder, where it lies by a hash of its source.

    Several processes may come here at once: each compiles into a folder of its own, and the cache replaces whole files.
    """
    sources = b"".join(file.read_bytes() for file in sorted(FOLDER.iterdir()))
    key = hashlib.sha256(" ".join((platform.machine(), *FLAGS)).encode() + sources).hexdigest()
    cache = get_cache_manager(key)
    path = cache.get_file("ptx_engine.so")
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, "ptx_engine.so")
            subprocess.run([str(compiler()), *FLAGS, str(FOLDER / "engine.c"), "-o", str(built), "-lm"], check=True)
            path = cache.put(built.read_bytes(), "ptx_engine.so", binary=True)
    engine = ctypes.CDLL(path)
    engine.op_name.restype = ctypes.c_char_p
    engine.launch_size.restype = engine.insn_size.restype = _u64
    engine.run_launch.argtypes = [ctypes.POINTER(LaunchStruct)]
    assert engine.launch_size() == ctypes.sizeof(LaunchStruct), "machine.h and binding.py differ"
    assert engine.insn_size() == INSN.itemsize, "machine.h and binding.py differ"
    return engine


@functools.cache
def operations() -> dict[str, int]:
    """Name of each of the engine's operations -> its number."""
    engine = library()
    return {engine.op_name(i).decode(): i for i in range(engine.op_count())}
