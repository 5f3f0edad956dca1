"""What holds for every linear op: LayerNorm + qkv, MLP, LayerNorm + MLP, and projection + residual."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deitfast.kernels import gemm, layernorm, layernorm_linear, layernorm_mlp_op, mlp_gelu_op
from deitfast.kernels.catalogue import Draw, Inputs
from deitfast.kernels.common import INTERPRETED
from tests.kernels.linear_ops import OPS, Op, check, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
EPS = 1e-6
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, and the interpreter is slow")


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


@pytest.mark.parametrize(
    ("leading", "width", "second"),
    [
        ((1, 197), 192, 144),
        ((2, 65), 384, 96),
        ((5, 17), 192, 257),
        ((3, 2), 768, 64),
        ((2, 1), 1024, 48),
        ((1, 64), 64, 128),
        ((7,), 33, 50),
        ((3, 2, 5), 31, 1),
        ((1, 1), 1, 3),
    ],
)
def test_matches_float64(op, device, dtype, leading, width, second):
    cancels = gradient_of_one_channel if op is OPS["layernorm_qkv"] and width == 1 else None
    check(op, op.inputs(Draw(0, dtype, device), leading, width, second), cancels)


def gradient_of_one_channel(inputs: Inputs, dout: Tensor) -> Inputs:
    """The size of the two terms whose difference is dx of a LayerNorm over one channel: exactly zero.

    Eager's fp32 gives that zero, for it subtracts from g the mean of one g. The compiler makes one rounding of g's last
    multiplication and that subtraction, so that the rounding of the mean is left.
    """
    g = dout @ inputs["weight"] * inputs["ln_weight"]
    return {"dx": g / EPS**0.5}


@pytest.mark.parametrize("ratio", [0.0, 3.0])
@pytest.mark.parametrize("outliers", [0, 2])
def test_rows_with_a_mean_and_outlier_channels(op, device, dtype, ratio, outliers):
    check(op, op.inputs(Draw(1, dtype, device), (2, 40), 192, 96, ratio=ratio, outliers=outliers))


def test_without_biases(op, device, dtype):
    inputs = op.inputs(Draw(2, dtype, device), (2, 9), 64, 48)
    check(op, inputs | {name: None for name in inputs if name in ("bias", "fc1_bias", "fc2_bias")})


@given(
    name=st.sampled_from(sorted(OPS)),
    leading=st.lists(st.integers(1, 6), min_size=0, max_size=2),
    tokens=st.integers(4, 9),
    width=st.integers(32, 140),
    second=st.integers(32, 140),
    ratio=st.floats(-3, 3),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=20 if INTERPRETED else 60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_random_shapes(name, leading, tokens, width, second, ratio, half, seed):
    """Four rows of 32 or more: the largest error of a handful of numbers is chance and says nothing about precision."""
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    draw = Draw(seed, torch.float16 if half else torch.float32, device)
    check(OPS[name], OPS[name].inputs(draw, (*leading, tokens), width, second, ratio=ratio))


@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3)])
def test_leading_shapes(op, device, leading):
    inputs = op.inputs(Draw(3, torch.float32, device), leading, 24, 40)
    if len(leading) == 1:
        inputs.pop("path_scale", None)  # (0,) has rows, but no batch of samples
    out = op.function(**inputs, **op.options)
    assert out.shape[:-1] == leading
    torch.testing.assert_close(out, op.reference(**inputs, **op.options))
    results = outputs_and_gradients(op.function, inputs, torch.ones_like(out), **op.options)
    expected = outputs_and_gradients(op.reference, inputs, torch.ones_like(out), **op.options)
    for name, gradient in results.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_strided_and_unaligned_inputs(op, device):
    """Transposed batch and tokens, rows of a wider tensor, a start that is not 16-byte aligned, an expanded batch."""
    draw = Draw(4, torch.float16, device)
    inputs = op.inputs(draw, (3, 10), 64, 64)
    wide = draw.normal(3, 10, 72)
    for x in (
        wide.transpose(0, 1)[:, :, :64].transpose(0, 1),
        wide[..., :64],
        wide[..., 3:67],
        wide.flatten()[1 : 1 + 3 * 10 * 64].view(3, 10, 64),
        wide[:1, :, :64].expand(3, -1, -1),
    ):
        assert x.shape == (3, 10, 64)
        names = {"x": x} | ({"residual": x.flip(0)[..., :64]} if "residual" in inputs else {})
        actual, expected = (function(**inputs | names, **op.options) for function in (op.function, op.reference))
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=5e-3)
    weights = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.ndim == 2}
    padded = {name: torch.nn.functional.pad(tensor, (0, 5))[:, : tensor.shape[1]] for name, tensor in weights.items()}
    check(op, inputs | padded)


def test_any_layout_of_the_incoming_gradient(op, device):
    inputs = op.inputs(Draw(5, torch.float32, device), (2, 6), 24, 40)
    for loss in (
        lambda out: out.sum(),
        lambda out: (out.transpose(0, 1).transpose(1, 2) * 0.5).square().sum(),
        lambda out: out[:, 3].square().sum(),
        lambda out: out[..., ::2].square().mean(),
    ):
        gradients = []
        for function in (op.function, op.reference):
            leaves = {
                name: None if tensor is None else tensor.clone().requires_grad_(name != "path_scale")
                for name, tensor in inputs.items()
            }
            loss(function(**leaves, **op.options)).backward()
            gradients.append({name: leaf.grad for name, leaf in leaves.items() if leaf is not None})
        for name, expected in gradients[1].items():
            torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5)


def test_same_bits_in_every_run(op, device, dtype):
    inputs = op.inputs(Draw(6, dtype, device), (2, 150), 64, 48)
    dout = torch.ones_like(op.function(**inputs, **op.options))
    first, second = (outputs_and_gradients(op.function, inputs, dout, **op.options) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_without_gradients_nothing_more_is_written(op, device, monkeypatch):
    """Under no_grad, and where no input wants a gradient, gelu' is not allocated; inputs are never changed."""
    saves: list[bool] = []

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            saves.append(inspect.signature(original).bind(*arguments).arguments["save"])
            return original(*arguments)

        return run

    for module, name in ((mlp_gelu_op, "linear_gelu_fwd"), (layernorm_mlp_op, "layernorm_gelu_fwd")):
        monkeypatch.setattr(module, name, recorded(getattr(module, name)))
    inputs = op.inputs(Draw(7, torch.float32, device), (2, 3), 24, 40)
    before = {name: None if tensor is None else tensor.clone() for name, tensor in inputs.items()}
    assert op.function(**inputs, **op.options).grad_fn is None
    wanting = {
        name: None if t is None else t.clone().requires_grad_(name != "path_scale") for name, t in inputs.items()
    }
    with torch.no_grad():
        assert op.function(**wanting, **op.options).grad_fn is None
    assert not any(saves)
    op.function(**wanting, **op.options).sum().backward()
    for name, tensor in before.items():
        assert tensor is None or (torch.equal(tensor, inputs[name]) and torch.equal(tensor, wanting[name])), name


def test_part_of_the_inputs_wants_gradients(op, device):
    inputs = op.inputs(Draw(8, torch.float32, device), (2, 3), 24, 40)
    inputs["x"].requires_grad_()
    op.function(**inputs, **op.options).sum().backward()
    assert inputs["x"].grad is not None
    assert all(tensor.grad is None for name, tensor in inputs.items() if name != "x" and tensor is not None)


class Spy:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_triton_kernels_run_exactly_where_they_should(op, device, monkeypatch):
    """On CUDA and under TRITON_INTERPRET=1 the public op launches its kernels, forward and backward; else none."""
    spies = {}
    for module, names in (
        (gemm, ("linear_kernel", "scale_and_sum_kernel")),
        (layernorm, ("layernorm_fwd_kernel", "layernorm_bwd_kernel")),
        (layernorm_linear, ("layernorm_linear_kernel",)),
    ):
        for name in names:
            spies[name] = Spy(getattr(module, name))
            monkeypatch.setattr(module, name, spies[name])
    inputs = op.inputs(Draw(9, torch.float32, device), (2, 3), 24, 40)
    leaves = {name: None if t is None else t.requires_grad_(name != "path_scale") for name, t in inputs.items()}
    op.function(**leaves, **op.options).sum().backward()
    norms, gelus = int("ln_weight" in inputs), int("fc1_weight" in inputs)
    expected = {
        "layernorm_linear_kernel": norms,  # a LayerNorm and the layer after it
        "linear_kernel": 1 + 2 * gelus - norms,  # the other layers, and the product of the backward with an epilogue
        "scale_and_sum_kernel": 1,
        "layernorm_fwd_kernel": 0,  # not on the chip that the interpreter stands for
        "layernorm_bwd_kernel": norms,
    }
    ran = INTERPRETED or device.type == "cuda"
    assert {name: spy.launches for name, spy in spies.items()} == {n: c * ran for n, c in expected.items()}


@eager_only
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(op, device, half):
    """Weights are cast as linear casts them; residual stream and LayerNorm stay fp32, as do all gradients."""
    inputs = op.inputs(Draw(10, torch.float32, device), (2, 9), 64, 48)
    leaves = {name: None if t is None else t.clone().requires_grad_(name != "path_scale") for name, t in inputs.items()}
    with torch.autocast(device.type, half):
        out = op.function(**leaves, **op.options)
        expected = op.reference(**inputs, **op.options)
    keeps_stream = "residual" in inputs or op.options.get("residual", False)
    assert out.dtype == (torch.float32 if keeps_stream else half) == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-2)
    out.sum().backward()
    for name, leaf in leaves.items():
        assert name == "path_scale" or leaf.grad.dtype == torch.float32, name


def test_fp32_residual_stream_beside_16_bit_weights(op, device):
    """x and the LayerNorm's parameters, residual and gamma in fp32, weights in fp16."""
    inputs = op.inputs(Draw(11, torch.float32, device), (3, 20), 64, 48)
    stream = {"ln_weight", "ln_bias", "residual", "gamma", "path_scale"} | ({"x"} if "ln_weight" in inputs else set())
    mixed = {name: t if t is None or name in stream else t.half() for name, t in inputs.items()}
    same = {name: None if t is None else t.float() for name, t in mixed.items()}
    out = op.function(**mixed, **op.options)
    dout = Draw(12, torch.float32, device).normal(*out.shape)
    actual = outputs_and_gradients(op.function, mixed, dout, **op.options)
    expected = outputs_and_gradients(op.reference, same, dout, **op.options)
    for name, result in actual.items():
        if name != "out":
            assert result.dtype == mixed[name[1:]].dtype, name
        error = torch.linalg.vector_norm(result.float() - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 2e-3, f"{name}: relative error {error:.1e}"


@eager_only
def test_opcheck(op, device):
    """The forward op of each file, and through its autograd formula the backward op."""
    inputs = op.inputs(Draw(13, torch.float32, device), (2, 3), 16, 24)
    overload = getattr(torch.ops.deitfast, op.function.__name__).default
    values = inputs | {"eps": 1e-6, "save": True, "subset": None, "subset_scale": 1.0} | dict(op.options)
    arguments = tuple(values[argument.name] for argument in overload._schema.arguments)
    arguments = tuple(
        a.requires_grad_() if isinstance(a, Tensor) and a is not inputs.get("path_scale") else a for a in arguments
    )
    torch.library.opcheck(overload, arguments)


@eager_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(op, device, dynamic):
    torch._dynamo.reset()
    names = list(op.inputs(Draw(14, torch.float32, device), (2, 3), 16, 24))

    def model(*tensors: Tensor) -> Tensor:
        return op.function(**dict(zip(names, tensors, strict=True)), **op.options).square() + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for leading in ((2, 5), (3, 4)):
        inputs = op.inputs(Draw(15, torch.float32, device), leading, 16, 24)
        leaves = [tensor.requires_grad_(name != "path_scale") for name, tensor in inputs.items()]
        expected, actual = model(*leaves), compiled(*leaves)
        torch.testing.assert_close(actual, expected)
        wanting = [leaf for leaf in leaves if leaf.requires_grad]
        for a, b in zip(*(torch.autograd.grad(out.sum(), wanting) for out in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
