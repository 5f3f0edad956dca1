"""Other libraries' ops, rehearsed with modules that have their signatures and compute in PyTorch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import peers_ops
from benchmarks.measuring.ops import OPS
from benchmarks.measuring.peers_ops import Absent, ways
from benchmarks.micro import Case
from benchmarks.reporting import NOT_MEASURED, goals
from deitfast.kernels.catalogue import Shape

SHAPE = Shape.of("Ti", 5, 3)
SDPA = F.scaled_dot_product_attention  # itself, while another stands in its place


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6, return_rstd: bool = False,
    return_mean: bool = False,
) -> Any:  # fmt: skip
    assert x.dim() == 2
    assert weight.dtype == torch.float32
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert return_rstd
    assert return_mean
    return out, rstd.flatten(), mean.flatten()


def mlp_func(x, weight1, weight2, activation: str, bias1=None, bias2=None, fuse_grad_accum=False, tuned=True):
    assert activation == "gelu_tanh_approx"
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


class _Normed(nn.Module):
    def __init__(self, width: int, eps: float, params_dtype: Any, device: Any) -> None:
        super().__init__()
        self.eps, self.made = eps, {"dtype": params_dtype, "device": device}
        self.layer_norm_weight, self.layer_norm_bias = (self.parameter(width) for _ in range(2))

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **self.made))

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias, self.eps)


class LayerNormLinear(_Normed):
    def __init__(self, in_features, out_features, eps=1e-5, bias=True, params_dtype=None, device="cuda"):
        super().__init__(in_features, eps, params_dtype, device)
        self.weight, self.bias = self.parameter(out_features, in_features), self.parameter(out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.normed(x), self.weight, self.bias)


class LayerNormMLP(_Normed):
    def __init__(self, hidden_size, ffn_hidden_size, eps=1e-5, bias=True, params_dtype=None, device="cuda"):
        super().__init__(hidden_size, eps, params_dtype, device)
        self.fc1_weight, self.fc1_bias = self.parameter(ffn_hidden_size, hidden_size), self.parameter(ffn_hidden_size)
        self.fc2_weight, self.fc2_bias = self.parameter(hidden_size, ffn_hidden_size), self.parameter(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return mlp_func(
            self.normed(x), self.fc1_weight, self.fc2_weight, "gelu_tanh_approx", self.fc1_bias, self.fc2_bias
        )


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, softmax_scale=None, causal=False) -> tuple[Tensor, None]:
    """(batch, tokens, heads, width) each."""
    return SDPA(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None


def plant_modules(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Have modules of these names, with these members, imported from now on."""
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The libraries are there; what fp8_autocast was asked for."""
    asked: list[bool] = []

    @contextlib.contextmanager
    def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None):
        asked.append(enabled)
        yield

    engine = {"LayerNormLinear": LayerNormLinear, "LayerNormMLP": LayerNormMLP, "fp8_autocast": fp8_autocast}
    plant_modules(monkeypatch, {
        "quack": {}, "quack.rmsnorm": {"layernorm_fwd": layernorm_fwd}, "quack.mlp": {"mlp_func": mlp_func},
        "transformer_engine": {}, "transformer_engine.pytorch": engine,
        "flash_attn": {}, "flash_attn.cute": {"flash_attn_func": flash_attn_func},
    })  # fmt: skip
    return asked


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("layernorm", "quack"),
        ("mlp_gelu", "quack"),
        ("layernorm_qkv", "transformer engine"),
        ("layernorm_mlp", "transformer engine"),
        ("layernorm_mlp", peers_ops.FP8),
        ("attention", "flash-attn 4"),
    ],
)
def test_a_peer_computes_the_op_forward_and_backward(op: str, name: str, entered: list[bool]) -> None:
    case = Case(OPS[op], SHAPE, "cpu", torch.float32)
    way = ways(OPS[op], "cuda")[name]
    assert not isinstance(way, Absent)
    inputs = case.inputs()
    exact, found = case.exact(inputs), case.both(way, inputs)
    assert found.keys() == exact.keys()
    tolerance = 4e-3 if "mlp" in op else 1e-5  # tanh in place of erf
    for tensor, value in found.items():
        scale = exact[tensor].abs().max()
        assert (value - exact[tensor]).abs().max() <= tolerance * scale, tensor
    assert bool(entered) == (name == peers_ops.FP8)


@pytest.mark.parametrize("op", ["attention", "layernorm", "layernorm_qkv", "layernorm_mlp", "mlp_gelu"])
def test_what_is_not_installed_is_absent_with_the_package_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("quack.rmsnorm", "quack.mlp", "transformer_engine.pytorch", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    absent = {name: way.reason for name, way in ways(OPS[op], "cuda").items() if isinstance(way, Absent)}
    packages = {"quack": "quack-kernels", "transformer engine": "transformer-engine", "flash-attn 4": "flash-attn-4"}
    for name, reason in absent.items():
        package = next((package for peer, package in packages.items() if name.startswith(peer)), "")
        assert package in reason
    assert any(name in absent for name in packages)


def test_the_goals_of_the_machine_at_hand() -> None:
    def row(way: str, speedup: float) -> dict[str, Any]:
        key = {"op": "attention", "model": "B", "tokens": 197, "batch": 256, "pass": "forward+backward", "way": way}
        return {"key": key, "ms": 1.0, "fused_speedup": speedup}

    def speed(way: str, batch: int, value: float) -> dict[str, Any]:
        key = {"op": "inference", "model": "deit_base_patch16_224", "way": way, "batch": batch}
        return {"key": key, "images_per_second": value}

    rows = [row("sdpa cudnn", 1.3), row("sdpa flash", 1.4)]
    rows += [speed("ours", 256, 270.0), speed("timm + compile", 256, 200.0), speed("ours", 512, 1.0)]
    on_h100 = {line.name: line for line in goals(rows, "NVIDIA H100 80GB HBM3")}
    assert (on_h100["attention on H100"].measured, on_h100["attention on H100"].met) == ("1.30 x", True)
    assert (on_h100["deit_base, inference"].measured, on_h100["deit_base, inference"].met) == ("1.35 x", True)
    on_a100 = {line.name: line for line in goals(rows, "NVIDIA A100-SXM4-80GB")}
    assert on_a100["attention on A100"].met is False
    assert on_a100["deit_base on 8 GPUs, with data, images/s"].goal == "25,400"
    elsewhere = {line.name: line for line in goals(rows)}
    assert elsewhere["attention on H100"].measured == elsewhere["attention on A100"].measured == NOT_MEASURED
