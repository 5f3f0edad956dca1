"""The attention half of a block as one op. What it shares with the MLP half under drop-path: test_subset.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deitfast.kernels import attention, layernorm_attention, layernorm_qkv, linear_residual
from deitfast.kernels.catalogue import Draw
from deitfast.kernels.common import INTERPRETED
from tests.kernels.linear_ops import ATTENTION, check, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, and the interpreter is slow")


@pytest.mark.parametrize(
    ("leading", "width", "heads"),
    [
        ((1, 197), 64, 1),
        ((2, 198), 64, 2),
        ((3, 17), 192, 3),
        ((3, 1), 64, 2),
        ((2, 2, 5), 160, 2),
        ((9,), 64, 1),
    ],
)
def test_matches_float64(device, dtype, leading, width, heads):
    check(ATTENTION, ATTENTION.inputs(Draw(0, dtype, device), leading, width), num_heads=heads)


@pytest.mark.parametrize("absent", [("gamma",), ("path_scale",), ("gamma", "path_scale", "qkv_bias", "proj_bias")])
def test_without_optional_inputs(device, dtype, absent):
    inputs = ATTENTION.inputs(Draw(1, dtype, device), (2, 9), 64, ratio=3.0, outliers=2)
    check(ATTENTION, inputs | dict.fromkeys(absent), num_heads=2)


@pytest.mark.parametrize("leading", [(2, 197), (3, 17), (2, 2, 5)])
def test_the_attention_carries_the_factor_of_drop_path(device, dtype, leading):
    """Without LayerScale its result is stored times the factor, 0 among them, and its backward has the factor too."""
    inputs = ATTENTION.inputs(Draw(6, dtype, device), leading, 64)
    check(ATTENTION, inputs | {"gamma": None}, num_heads=1)


def test_is_the_chain_of_its_three_ops(device, dtype):
    """The same kernels on the same numbers, but for two gradients: that of x is rounded once instead of twice, and that
    of qkv_bias never sums the rounded gradient of qkv.
    """

    def chain(x, ln_weight, ln_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, path_scale, num_heads):
        qkv = layernorm_qkv(x, ln_weight, ln_bias, qkv_weight, qkv_bias)
        return linear_residual(attention(qkv, num_heads), proj_weight, proj_bias, x, gamma, path_scale)

    inputs = ATTENTION.inputs(Draw(2, dtype, device), (2, 40), 64)
    dout = Draw(3, dtype, device).normal(2, 40, 64)
    expected, actual = (outputs_and_gradients(f, inputs, dout, num_heads=1) for f in (chain, layernorm_attention))
    for name, result in actual.items():
        if name in ("dx", "dqkv_bias"):
            torch.testing.assert_close(result, expected[name], rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(result, expected[name]), name


def test_the_key_bias_has_no_gradient(device):
    """It shifts all scores of a query alike. Many tokens, with which eager PyTorch's rounding error adds up."""
    inputs = ATTENTION.inputs(Draw(9, torch.float16, device), (2, 130), 64)
    gradients = outputs_and_gradients(layernorm_attention, inputs, torch.ones_like(inputs["x"]), num_heads=1)
    assert not gradients["dqkv_bias"][64:128].any()
    assert gradients["dqkv_bias"][:64].any()


@pytest.mark.parametrize("leading", [(0, 5), (2, 0, 3)])
def test_an_empty_batch(device, leading):
    inputs = ATTENTION.inputs(Draw(4, torch.float32, device), leading, 64)
    results = outputs_and_gradients(layernorm_attention, inputs, torch.zeros(*leading, 64, device=device), num_heads=1)
    assert results["out"].shape == (*leading, 64)
    assert not results["dqkv_weight"].any()


@pytest.mark.parametrize("wanting", ["x", "qkv_bias", "proj_weight", "gamma"])
def test_one_input_alone_wants_a_gradient(device, wanting):
    """The same gradient as if all did, and none for the others."""
    inputs = ATTENTION.inputs(Draw(5, torch.float32, device), (2, 5), 64)
    expected = outputs_and_gradients(layernorm_attention, inputs, torch.ones_like(inputs["x"]), num_heads=1)
    inputs[wanting].requires_grad_()
    layernorm_attention(**inputs, num_heads=1).sum().backward()
    assert torch.equal(inputs[wanting].grad, expected[f"d{wanting}"])
    assert all(tensor.grad is None for name, tensor in inputs.items() if name != wanting)


@eager_only
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(device, half):
    inputs = ATTENTION.inputs(Draw(6, torch.float32, device), (2, 9), 64)
    leaves = {name: t.clone().requires_grad_(name != "path_scale") for name, t in inputs.items()}
    with torch.autocast(device.type, half):
        out = layernorm_attention(**leaves, num_heads=2)
        expected = ATTENTION.reference(**inputs, num_heads=2)
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for name, leaf in leaves.items() if name != "path_scale")


@eager_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(device, dynamic):
    torch._dynamo.reset()
    names = list(ATTENTION.inputs(Draw(7, torch.float32, device), (2, 3), 64))

    def model(*tensors: Tensor) -> Tensor:
        return layernorm_attention(**dict(zip(names, tensors, strict=True)), num_heads=2).square() + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for leading in ((2, 5), (3, 4)):
        inputs = ATTENTION.inputs(Draw(8, torch.float32, device), leading, 64)
        leaves = [tensor.requires_grad_(name != "path_scale") for name, tensor in inputs.items()]
        expected, actual = model(*leaves), compiled(*leaves)
        torch.testing.assert_close(actual, expected)
        wanting = [leaf for leaf in leaves if leaf.requires_grad]
        for a, b in zip(*(torch.autograd.grad(out.sum(), wanting) for out in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": zeros(64)}, ValueError, r"layernorm_attention: x has shape \(64,\), expected \(\.\.\., tokens, width\)"),
        ({"x": zeros(3, 64), "path_scale": zeros(3)}, ValueError, r"path_scale and subset need a batch dimension"),
        ({"qkv_weight": zeros(128, 64), "qkv_bias": None}, ValueError, r"qkv_weight has shape \(128, 64\), expected"),
        ({"proj_weight": zeros(32, 64), "proj_bias": None}, ValueError, r"proj_weight has shape \(32, 64\), expected"),
        (
            {"proj_weight": zeros(64, 32)},
            ValueError,
            r"proj_weight has shape \(64, 32\), expected \(N, 64\) because the",
        ),
        (
            {"proj_weight": zeros(64, 64).half(), "proj_bias": None},
            TypeError,
            r"proj_weight is torch.float16 but qkv_we",
        ),
        ({"num_heads": 4}, ValueError, r"num_heads is 4; width 64 takes \[2, 1\]"),
        ({"path_scale": zeros(3)}, ValueError, r"path_scale has shape \(3,\), expected \(2,\)"),
        ({"gamma": zeros(63)}, ValueError, r"gamma has shape \(63,\), expected \(64,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    good = {
        "x": zeros(2, 3, 64),
        "ln_weight": zeros(64),
        "ln_bias": zeros(64),
        "qkv_weight": zeros(192, 64),
        "qkv_bias": zeros(192),
        "proj_weight": zeros(64, 64),
        "proj_bias": zeros(64),
        "num_heads": 1,
    }
    layernorm_attention(**good)
    with pytest.raises(error, match=message):
        layernorm_attention(**good | change)
