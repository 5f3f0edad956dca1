"""What the fused ops are compared with: the same function of the same tensors, computed by others.

Each baseline takes the keyword arguments of the op. One that cannot run here is an `Absent` with the reason, so that
a table never leaves it out in silence.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ops import EPS, Op

Way = Callable[..., Tensor]
FUSED = "fused"
COMPILED = "torch.compile"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Absent:
    """A baseline that cannot run here, and why."""

    reason: str


def ways(op: Op, device: str) -> dict[str, Way | Absent]:
    """By name: the fused op, eager PyTorch, what else there is for this op, and, last, torch.compile of eager."""
    found: dict[str, Way | Absent] = {FUSED: op.fused, "eager": op.reference}
    if op.name == "attention":
        found |= {name: _with_backend(op.reference, backend) for name, backend in SDPA.items()}
        found["flash-attn 2"] = _flash_attn("flash_attn", device)
        found["flash-attn 3"] = _flash_attn("flash_attn_interface", device)
    if op.name in ("layernorm", "layernorm_qkv"):
        found["liger"] = _liger(op.name, device)
    # Without a GPU the compiler's front half is rehearsed: generating C++ takes minutes and says nothing about a GPU.
    backend = "inductor" if device == "cuda" else "aot_eager"
    found[COMPILED] = torch.compile(op.reference, fullgraph=True, dynamic=False, backend=backend)
    return found


def _with_backend(reference: Way, backend: SDPBackend) -> Way:
    def run(**arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return reference(**arguments)

    return run


def _import(module: str, package: str, device: str) -> Any:
    if device != "cuda":
        return Absent(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package whose compiled part does not fit this torch fails in many ways
        lines = str(error).splitlines()
        return Absent(f"{package} does not import: {type(error).__name__}: {lines[0] if lines else ''}")


def _flash_attn(module: str, device: str) -> Way | Absent:
    flash = _import(module, module, device)
    if isinstance(flash, Absent):
        return flash

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        out = flash.flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, num_heads, -1)))
        return (out[0] if isinstance(out, tuple) else out).flatten(-2)

    return run


def _liger(op: str, device: str) -> Way | Absent:
    liger = _import("liger_kernel.ops.layer_norm", "liger_kernel", device)
    if isinstance(liger, Absent):
        return liger

    def layernorm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
        return liger.LigerLayerNormFunction.apply(x, ln_weight, ln_bias, EPS)

    def layernorm_qkv(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(layernorm(x, ln_weight, ln_bias), weight, bias)

    return layernorm if op == "layernorm" else layernorm_qkv
