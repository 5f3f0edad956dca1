"""The same function of the same tensors by others: what `benchmarks.micro` times beside our ops.

Each baseline takes the keyword arguments of the op. One that cannot run here is an `Absent` with the reason, so that a
table never leaves it out in silence. QuACK and TransformerEngine approximate GELU by tanh, ours is exact; QuACK's
LayerNorm has no backward, and is timed with PyTorch's.

Signatures: quack/rmsnorm.py and quack/mlp.py (github.com/Dao-AILab/quack), LayerNormLinear and LayerNormMLP
(github.com/NVIDIA/TransformerEngine), flash_attn/cute/interface.py (github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measuring.ops import EPS, Way
from deitfast.kernels.catalogue import Op

FUSED = "fused"
COMPILED = "torch.compile"
FP8 = "transformer engine fp8"
PEER_FACTOR = 10.0
"""How much farther than eager a baseline may be from float64: enough to tell another rounding from another function."""
FP8_FACTOR = 16 * PEER_FACTOR
"""The same for FP8, whose 3 bits of mantissa (E4M3) are 4 less than bf16's 7."""
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
    found: dict[str, Way | Absent] = {FUSED: op.function, "eager": op.reference}
    if op.name == "attention":
        found |= {name: _with_backend(op.reference, backend) for name, backend in SDPA.items()}
        found["flash-attn 2"] = _packed_flash("flash_attn", device)
        found["flash-attn 3"] = _packed_flash("flash_attn_interface", device)
        found["flash-attn 4"] = _flash_4(device)
    if op.name in ("layernorm", "layernorm_qkv"):
        found["liger"] = _liger(op.name, device)
    if op.name == "layernorm":
        found["quack"] = _quack_layernorm(device)
    if op.name == "mlp_gelu":
        found["quack"] = _quack_mlp(device)
    if op.name in ("layernorm_qkv", "layernorm_mlp"):
        found["transformer engine"] = _transformer_engine(op.name, device, fp8=False)
        found[FP8] = _transformer_engine(op.name, device, fp8=True)
    # Without a GPU the compiler's front half is rehearsed: generating C++ takes minutes and says nothing about a GPU.
    backend = "inductor" if device == "cuda" else "aot_eager"
    found[COMPILED] = torch.compile(op.reference, fullgraph=True, dynamic=False, backend=backend)
    return found


def factor_of(way: str) -> float:
    """How much farther than eager the baseline may be from float64."""
    return FP8_FACTOR if way == FP8 else PEER_FACTOR


def _with_backend(reference: Way, backend: SDPBackend) -> Way:
    def run(**arguments: Any) -> Tensor:
        with sdpa_kernel(backend):
            return reference(**arguments)

    return run


def _import(module: str, package: str, device: str) -> Any:
    """The module, or why it is `Absent`."""
    if device != "cuda":
        return Absent(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package whose compiled part does not fit this torch fails in many ways
        lines = str(error).splitlines()
        return Absent(f"{package} does not import: {type(error).__name__}: {lines[0] if lines else ''}")


def _packed_flash(module: str, device: str) -> Way | Absent:
    flash = _import(module, module, device)
    if isinstance(flash, Absent):
        return flash

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        out = flash.flash_attn_qkvpacked_func(qkv.unflatten(-1, (3, num_heads, -1)))
        return (out[0] if isinstance(out, tuple) else out).flatten(-2)

    return run


def _flash_4(device: str) -> Way | Absent:
    flash = _import("flash_attn.cute", "flash-attn-4 (flash_attn.cute)", device)
    if isinstance(flash, Absent):
        return flash

    def run(qkv: Tensor, num_heads: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
        out = flash.flash_attn_func(q, k, v)
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


def _quack_layernorm(device: str) -> Way | Absent:
    quack = _import("quack.rmsnorm", "quack-kernels", device)
    if isinstance(quack, Absent):
        return quack

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            rows = x.flatten(0, -2)
            out, rstd, mean = quack.layernorm_fwd(
                rows, weight.float(), bias.float(), EPS, return_rstd=True, return_mean=True
            )
            ctx.save_for_backward(rows, weight, bias, mean, rstd)
            return out.view_as(x)

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            x, weight, bias, mean, rstd = ctx.saved_tensors
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                dout.flatten(0, -2), x, x.shape[-1:], mean[:, None], rstd[:, None], weight, bias, [True] * 3
            )
            return dx.view_as(dout), dweight, dbias

    def layernorm(x: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
        return LayerNorm.apply(x, ln_weight, ln_bias)

    return layernorm


def _quack_mlp(device: str) -> Way | Absent:
    quack = _import("quack.mlp", "quack-kernels", device)
    if isinstance(quack, Absent):
        return quack

    def mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
        return quack.mlp_func(x, fc1_weight, fc2_weight, "gelu_tanh_approx", bias1=fc1_bias, bias2=fc2_bias)

    return mlp


def fp8_context(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """TransformerEngine's modules in FP8, by its default recipe; `autocast` is the newer name."""
    return (getattr(engine, "autocast", None) or engine.fp8_autocast)(enabled=True)


def _transformer_engine(op: str, device: str, fp8: bool) -> Way | Absent:
    """LayerNormLinear or LayerNormMLP with the given tensors in place of the module's own."""
    engine = _import("transformer_engine.pytorch", "transformer-engine", device)
    if isinstance(engine, Absent):
        return engine
    modules: dict[Any, torch.nn.Module] = {}

    def call(
        kind: Callable[..., torch.nn.Module], sizes: tuple[int, int], x: Tensor, tensors: dict[str, Tensor]
    ) -> Tensor:
        key = (*sizes, x.dtype)
        if key not in modules:
            modules[key] = kind(*sizes, eps=EPS, params_dtype=x.dtype, device=x.device)
        with fp8_context(engine) if fp8 else contextlib.nullcontext():
            return torch.func.functional_call(modules[key], tensors, (x,))

    def layernorm_qkv(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        tensors = {"layer_norm_weight": ln_weight, "layer_norm_bias": ln_bias, "weight": weight, "bias": bias}
        return call(engine.LayerNormLinear, (weight.shape[1], weight.shape[0]), x, tensors)

    def layernorm_mlp(
        x: Tensor, ln_weight: Tensor, ln_bias: Tensor, gamma: Tensor, path_scale: Tensor, residual: bool, **fc: Tensor
    ) -> Tensor:
        tensors = {"layer_norm_weight": ln_weight, "layer_norm_bias": ln_bias, **fc}
        branch = call(engine.LayerNormMLP, (x.shape[-1], fc["fc1_weight"].shape[0]), x, tensors)
        return x + branch * gamma * path_scale.to(branch.dtype).view(-1, *[1] * (x.ndim - 1))

    return layernorm_qkv if op == "layernorm_qkv" else layernorm_mlp
