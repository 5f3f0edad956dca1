"""mlp_gelu, layernorm_mlp and linear_residual: what is theirs alone. For what holds for all: test_linear_ops.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deitfast.kernels.catalogue import Draw, layernorm_mlp_inputs, linear_residual_inputs, mlp_gelu_inputs
from deitfast.kernels.common import INTERPRETED, record
from deitfast.kernels.gemm_kernels import scale_and_sum_kernel
from deitfast.kernels.layernorm_mlp_op import layernorm_mlp
from deitfast.kernels.linear_residual_op import linear_residual
from deitfast.kernels.mlp_gelu_op import mlp_gelu
from tests.kernels.linear_ops import OPS, check, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def test_gelu_tails(device, dtype):
    """Hidden values from -40 to 40, where gelu is 0 or the identity and its derivative 0 or 1."""
    inputs = mlp_gelu_inputs(Draw(0, dtype, device), (2, 20), 32, 96)
    check(OPS["mlp_gelu"], inputs | {"fc1_weight": inputs["fc1_weight"] * 10})


def test_hidden_and_output_of_any_width(device):
    draw = Draw(1, torch.float32, device)
    inputs = mlp_gelu_inputs(draw, (3, 5), 24, 70)
    check(OPS["mlp_gelu"], inputs | {"fc2_weight": draw.normal(11, 70), "fc2_bias": draw.normal(11)})


@pytest.mark.parametrize("options", [(), ("gamma",), ("path_scale",), ("gamma", "path_scale")])
@pytest.mark.parametrize("name", ["linear_residual", "layernorm_mlp"])
def test_layer_scale_and_drop_path_are_optional(device, dtype, name, options):
    inputs = OPS[name].inputs(Draw(2, dtype, device), (4, 9), 48, 64)
    check(OPS[name], inputs | {option: None for option in ("gamma", "path_scale") if option not in options})


def test_layernorm_mlp_without_residual(device, dtype):
    inputs = layernorm_mlp_inputs(Draw(3, dtype, device), (4, 9), 48, 64)
    check(OPS["layernorm_mlp"], inputs | {"gamma": None, "path_scale": None}, residual=False)


def test_layer_scale_of_zero_still_learns(device):
    """gamma = 0: the branch adds nothing, and gamma's gradient is that of the unscaled branch."""
    for op, make in ((OPS["linear_residual"], linear_residual_inputs), (OPS["layernorm_mlp"], layernorm_mlp_inputs)):
        inputs = make(Draw(4, torch.float32, device), (3, 7), 24, 40)
        inputs["gamma"] = torch.zeros_like(inputs["gamma"])
        check(op, inputs)
        stream = inputs.get("residual", inputs["x"])
        results = outputs_and_gradients(op.function, inputs, torch.ones_like(stream), **op.options)
        assert torch.equal(results["out"], stream)
        assert results["dgamma"].abs().min() > 0


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has launches of its own")
@pytest.mark.parametrize(("gamma", "written"), [(False, False), (True, True)])
def test_drop_path_alone_writes_no_gradient_once_more(gamma, written):
    """Its factor lies in gelu and gelu': of the incoming gradient only sums are taken. LayerScale wants it written."""
    inputs = layernorm_mlp_inputs(Draw(6, torch.bfloat16), (16, 5), 64, 256) | ({} if gamma else {"gamma": None})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, record(90) as launches:
        leaves = {
            name: None if x is None else mode.from_tensor(x).detach().requires_grad_(name != "path_scale")
            for name, x in inputs.items()
        }
        layernorm_mlp(**leaves, residual=True).sum().backward()
    (sums,) = (launch.arguments for launch in launches if launch.kernel is scale_and_sum_kernel)
    assert (sums["branch"] is not None, sums["scaled"] is not None) == (written, written)


def test_dropped_samples_pass_through(device):
    inputs = layernorm_mlp_inputs(Draw(5, torch.float16, device), (4, 9), 48, 64)
    out = layernorm_mlp(**inputs, residual=True)
    dropped = inputs["path_scale"] == 0
    assert torch.equal(out[dropped], inputs["x"][dropped])
    assert not torch.equal(out[~dropped], inputs["x"][~dropped])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": zeros()}, ValueError, r"mlp_gelu: x has shape \(\), expected \(\.\.\., D\)"),
        (
            {"x": zeros(8, 3).T},
            ValueError,
            r"x of shape \(3, 8\) has strides \(1, 3\); its last dimension",
        ),
        ({"x": zeros(2, 8).half()}, TypeError, r"x is torch.float16 but fc1_weight is torch.float32"),
        ({"fc1_weight": zeros(12, 9)}, ValueError, r"fc1_weight has shape \(12, 9\), expected \(N, 8\)"),
        ({"fc1_bias": zeros(8)}, ValueError, r"fc1_bias has shape \(8,\), expected \(12,\)"),
        ({"fc2_weight": zeros(8, 13)}, ValueError, r"fc2_weight .*\(N, 12\) because the hidden layer has 12 channels"),
        ({"fc2_weight": zeros(8, 12).half(), "fc2_bias": None}, TypeError, r"fc2_weight is torch.float16"),
        ({"fc2_bias": zeros(8).half()}, TypeError, r"fc2_bias is torch.float16 but fc2_weight is torch.float32"),
    ],
)
def test_mlp_names_bad_input(change, error, message):
    good = {
        "x": zeros(2, 8),
        "fc1_weight": zeros(12, 8),
        "fc1_bias": zeros(12),
        "fc2_weight": zeros(8, 12),
        "fc2_bias": zeros(8),
    }
    mlp_gelu(**good)
    with pytest.raises(error, match=message):
        mlp_gelu(**good | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": zeros()}, ValueError, r"linear_residual: x has shape \(\)"),
        ({"x": zeros(2, 3, 8).half()}, TypeError, r"x is torch.float16 but weight is torch.float32"),
        ({"residual": zeros(2, 3, 7)}, ValueError, r"residual has shape \(2, 3, 7\), expected \(2, 3, 6\)"),
        ({"residual": zeros(2, 3, 6).half()}, TypeError, r"residual is torch.float16 but weight is torch.float32"),
        ({"gamma": zeros(7)}, ValueError, r"gamma has shape \(7,\), expected \(6,\)"),
        ({"path_scale": zeros(3)}, ValueError, r"path_scale has shape \(3,\), expected \(2,\)"),
        ({"path_scale": zeros(2).half()}, TypeError, r"path_scale is torch.float16, expected torch.float32"),
        ({"path_scale": zeros(2).requires_grad_()}, ValueError, r"path_scale requires a gradient, but it gets none"),
    ],
)
def test_linear_residual_names_bad_input(change, error, message):
    good = {"x": zeros(2, 3, 8), "weight": zeros(6, 8), "bias": zeros(6), "residual": zeros(2, 3, 6)}
    linear_residual(**good)
    with pytest.raises(error, match=message):
        linear_residual(**good | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": zeros(8)}, r"gamma, path_scale and subset belong to the residual; pass residual=True"),
        (
            {"residual": True, "path_scale": zeros(2)},
            r"path_scale needs a batch dimension, but .* \(8,\)",
        ),
        (
            {"residual": True, "fc2_weight": zeros(7, 12), "fc2_bias": None},
            r"fc2_weight has shape \(7, 12\), expected 8 rows to add its output to x of shape \(8,\)",
        ),
    ],
)
def test_layernorm_mlp_names_bad_input(change, message):
    good = {
        "x": zeros(8),
        "ln_weight": zeros(8),
        "ln_bias": zeros(8),
        "fc1_weight": zeros(12, 8),
        "fc1_bias": zeros(12),
        "fc2_weight": zeros(8, 12),
        "fc2_bias": zeros(8),
    }
    layernorm_mlp(**good)
    with pytest.raises(ValueError, match=message):
        layernorm_mlp(**good | change)
