"""LayerNorm + qkv: the row statistics, and what the op refuses. What holds for every linear op: test_linear_ops.py."""

from __future__ import annotations

import pytest
import torch

from deitfast.kernels.catalogue import Draw, layernorm_qkv_inputs
from deitfast.kernels.layernorm import layernorm_bwd, layernorm_fwd
from deitfast.kernels.layernorm_qkv_op import layernorm_qkv
from tests.kernels.linear_ops import OPS, check

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.mark.parametrize(("rows", "width"), [(1, 192), (198, 192), (65, 384), (40, 768), (9, 1000), (3, 5000)])
def test_layernorm_statistics(device, rows, width):
    """mean and rstd, saved in fp32, within a few ulp for rows far from zero."""
    x = Draw(0, torch.float32, device).normal(rows, width, mean=100.0)
    weight, bias = torch.ones(width, device=device), torch.zeros(width, device=device)
    out, mean, rstd = layernorm_fwd(x, weight, bias, 1e-6, torch.float16)
    x64 = x.double()
    torch.testing.assert_close(mean.double(), x64.mean(1), rtol=3e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (x64.var(1, correction=0) + 1e-6).rsqrt(), rtol=2e-6, atol=0)
    assert (out.dtype, mean.dtype, rstd.dtype) == (torch.float16, torch.float32, torch.float32)


def test_layernorm_backward_adds_the_residual_gradient(device, dtype):
    draw = Draw(1, dtype, device)
    x, dout, dresidual = (draw.normal(37, 72) for _ in range(3))
    weight = draw.normal(72, mean=1.0)
    _, mean, rstd = layernorm_fwd(x, weight, weight, 1e-6, dtype)
    alone, *parameters = layernorm_bwd(dout, x, weight, mean, rstd)
    both, *same_parameters = layernorm_bwd(dout, x, weight, mean, rstd, dresidual)
    torch.testing.assert_close(both, alone + dresidual, rtol=2e-2 if dtype == torch.bfloat16 else 3e-3, atol=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(parameters, same_parameters, strict=True))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_eps(device, eps):
    """Rows of tiny variance, and a constant row, where eps decides the output."""
    inputs = layernorm_qkv_inputs(Draw(2, torch.float32, device), (3, 4), 64, 48)
    inputs["x"] = inputs["x"] * 1e-2
    check(OPS["layernorm_qkv"], inputs, eps=eps)
    inputs["x"][0, 0] = 0.5
    out = layernorm_qkv(**inputs, eps=eps)
    torch.testing.assert_close(out[0, 0], inputs["weight"] @ inputs["ln_bias"] + inputs["bias"])


def test_largest_values_of_fp16(device):
    """x near fp16's largest value, 65,504: its square or a product with raw x would overflow."""
    inputs = layernorm_qkv_inputs(Draw(3, torch.float16, device), (1, 33), 192, 96)
    inputs["x"] = (inputs["x"].float() * 15000).clamp(-65000, 65000).half()
    check(OPS["layernorm_qkv"], inputs)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": zeros()}, ValueError, r"layernorm_qkv: x has shape \(\), expected \(\.\.\., D\)"),
        ({"x": zeros(2, 0)}, ValueError, r"x has shape \(2, 0\)"),
        (
            {"x": zeros(8, 3).T},
            ValueError,
            r"x of shape \(3, 8\) has strides \(1, 3\); its last dimension",
        ),
        ({"x": zeros(2, 8).double()}, TypeError, r"x is torch.float64"),
        ({"x": zeros(2, 8).half()}, TypeError, r"x is torch.float16 but weight is torch.float32; cast x"),
        ({"ln_weight": zeros(7)}, ValueError, r"ln_weight has shape \(7,\), expected \(8,\)"),
        ({"ln_bias": zeros(8, 1)}, ValueError, r"ln_bias has shape \(8, 1\), expected \(8,\)"),
        ({"ln_bias": zeros(16)[::2]}, ValueError, r"ln_bias of shape \(8,\) has strides \(2,\)"),
        (
            {"weight": zeros(24, 9)},
            ValueError,
            r"weight has shape \(24, 9\), expected \(N, 8\) because x has",
        ),
        ({"weight": zeros(24, 8).double()}, TypeError, r"float64"),
        ({"weight": zeros(8, 24).T}, ValueError, r"weight of shape \(24, 8\) has strides \(1, 24\)"),
        ({"bias": zeros(8)}, ValueError, r"bias has shape \(8,\), expected \(24,\)"),
        ({"bias": zeros(24).half()}, TypeError, r"bias is torch.float16 but weight is torch.float32"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, r"x is on meta but weight on cpu"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {"x": zeros(2, 8), "ln_weight": zeros(8), "ln_bias": zeros(8), "weight": zeros(24, 8), "bias": zeros(24)}
    layernorm_qkv(**good)
    with pytest.raises(error, match=message):
        layernorm_qkv(**good | change)
