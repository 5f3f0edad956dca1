"""Drop-path by subset in both halves of a block: the branch runs for some samples, the others pass unchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deitfast.kernels import gemm, layernorm, layernorm_linear
from deitfast.kernels.catalogue import Draw, Inputs
from deitfast.kernels.common import INTERPRETED
from tests.kernels.linear_ops import HALVES, Op, check, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, and the interpreter is slow")


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> Op:
    return HALVES[request.param]


def make(
    half: Op, dtype: torch.dtype, device: Any, batch: int, tokens: int, subset: list[int], width: int = 64
) -> Inputs:
    inputs = half.inputs(Draw(len(subset), dtype, device), (batch, tokens), width, 48)
    return inputs | {"path_scale": None}


def options(half: Op, subset: list[int], device: Any, scale: float = 1.25) -> dict[str, Any]:
    heads = {"num_heads": 1} if half is HALVES["layernorm_attention"] else {"residual": True}
    return heads | {"subset": torch.tensor(subset, dtype=torch.int64, device=device), "subset_scale": scale}


@pytest.mark.parametrize(
    ("batch", "tokens", "subset"),
    [(2, 9, [0, 1]), (5, 17, [0, 2, 3]), (3, 197, [1]), (2, 198, [1]), (4, 3, [0, 1, 2]), (3, 1, [0, 2])],
)
def test_matches_float64(half, device, dtype, batch, tokens, subset):
    """Against all samples run through the branch, with factors of 0."""
    inputs = make(half, dtype, device, batch, tokens, subset)
    check(half, inputs, **options(half, subset, device))


def test_without_gamma(half, device, dtype):
    inputs = make(half, dtype, device, 4, 7, [1, 3]) | {"gamma": None}
    check(half, inputs, **options(half, [1, 3], device))


def test_small_tiles_and_few_programs(half, device, monkeypatch):
    """The row blocks of a GPU in the interpreter, so that blocks straddle samples and programs loop."""
    for module in (layernorm, layernorm_linear):  # which on this chip takes two kernels
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(layernorm, "BWD_PROGRAMS", {2: 3, 4: 3})
    monkeypatch.setattr(gemm, "INTERPRETER_SUM_LAUNCH", replace(gemm.SUM_LAUNCH, programs=3))
    subset = [0, 3, 4, 6]
    inputs = make(half, torch.float32, device, 7, 23, subset, width=128)
    check(half, inputs, **options(half, subset, device))


@pytest.mark.parametrize(("arch", "tile"), [(0, (2, 0)), (0, (2, 64)), (90, (2, 128)), (90, (2, 256))])
def test_tiles_of_the_last_product(monkeypatch, arch, tile):
    monkeypatch.setattr(gemm, "INTERPRETED", False)
    monkeypatch.setattr(gemm, "architecture", lambda x: arch)
    used = []
    choose = gemm.linear_launch
    monkeypatch.setattr(gemm, "linear_launch", lambda *arguments: (used.append(choose(*arguments)), used[-1])[1])
    half, subset = HALVES["layernorm_mlp"], [0, 2]
    inputs = make(half, torch.float16, "cpu", 3, 70, subset, width={0: 67, 64: 64, 128: 128, 256: 256}[tile[1]])
    check(half, inputs, **options(half, subset, "cpu"))
    assert gemm.LAUNCHES[arch][tile] in used or not INTERPRETED


def test_more_samples_than_the_copy_scans_at_once(device):
    half, subset = HALVES["layernorm_mlp"], [i for i in range(301) if i % 3]
    inputs = make(half, torch.float32, device, 301, 2, subset, width=32)
    check(half, inputs, **options(half, subset, device))


@pytest.mark.parametrize("subset", [[], [0], [3], [1, 2], [0, 1, 2, 3]])
def test_samples_not_kept_pass_unchanged(half, device, subset):
    """Bit for bit, forward and backward; also where x is a part of a wider tensor. An empty subset is allowed."""
    others = [i for i in range(4) if i not in subset]
    inputs = make(half, torch.float16, device, 4, 5, subset)
    inputs["x"] = Draw(9, torch.float16, device).normal(4, 5, 72)[..., :64]
    dout = Draw(10, torch.float16, device).normal(4, 5, 64)
    results = outputs_and_gradients(half.function, inputs, dout, **options(half, subset, device))
    assert torch.equal(results["out"][others], inputs["x"][others])
    assert torch.equal(results["dx"][others], dout[others])
    assert all(result.isfinite().all() for result in results.values())
    assert not subset or not torch.equal(results["out"][subset], inputs["x"][subset])


def test_all_samples_kept_are_the_undropped_branch(half, device):
    inputs = make(half, torch.float16, device, 3, 11, [0, 1, 2])
    dout = Draw(11, torch.float16, device).normal(3, 11, 64)
    some = options(half, [0, 1, 2], device, scale=1.0)
    everything = {name: value for name, value in some.items() if not name.startswith("subset")}
    subset, whole = (outputs_and_gradients(half.function, inputs, dout, **o) for o in (some, everything))
    for name, result in subset.items():
        assert torch.equal(result, whole[name]), name


def test_same_bits_in_every_run(half, device):
    inputs = make(half, torch.float16, device, 6, 30, [1, 2, 5])
    dout = torch.ones_like(inputs["x"])
    first, second = (
        outputs_and_gradients(half.function, inputs, dout, **options(half, [1, 2, 5], device)) for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_fp32_stream_beside_16_bit_weights(half, device):
    inputs = make(half, torch.float32, device, 4, 10, [0, 3])
    stream = {"x", "ln_weight", "ln_bias", "gamma"}
    mixed = {name: t if t is None or name in stream else t.half() for name, t in inputs.items()}
    same = {name: None if t is None else t.float() for name, t in mixed.items()}
    dout = Draw(12, torch.float32, device).normal(4, 10, 64)
    actual = outputs_and_gradients(half.function, mixed, dout, **options(half, [0, 3], device))
    expected = outputs_and_gradients(half.reference, same, dout, **options(half, [0, 3], device))
    for name, result in actual.items():
        error = torch.linalg.vector_norm(result.float() - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 2e-3, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("wanting", ["x", "fc1_weight", "fc2_bias", "gamma"])
def test_one_input_alone_wants_a_gradient(device, wanting):
    half = HALVES["layernorm_mlp"]
    inputs = make(half, torch.float32, device, 3, 5, [0, 2])
    dout = torch.ones_like(inputs["x"])
    expected = outputs_and_gradients(half.function, inputs, dout, **options(half, [0, 2], device))
    inputs[wanting].requires_grad_()
    half.function(**inputs, **options(half, [0, 2], device)).sum().backward()
    assert torch.equal(inputs[wanting].grad, expected[f"d{wanting}"])
    assert all(tensor is None or tensor.grad is None for name, tensor in inputs.items() if name != wanting)


@eager_only
@pytest.mark.parametrize("subset", [None, [0, 2]])
def test_opcheck(half, device, subset):
    """The forward op of each half, and through its autograd formula the backward op."""
    inputs = half.inputs(Draw(13, torch.float32, device), (3, 3), 32, 24)
    overload = getattr(torch.ops.deitfast, half.function.__name__).default
    index = None if subset is None else torch.tensor(subset, device=device)
    inputs["path_scale"] = inputs["path_scale"] if subset is None else None
    values = inputs | {"eps": 1e-6, "save": True, "residual": True, "num_heads": 1, "scale": 0.2}
    values |= {"subset": index, "subset_scale": 1.5}
    arguments = tuple(values[argument.name] for argument in overload._schema.arguments)
    wanting = [tensor for name, tensor in inputs.items() if tensor is not None and name != "path_scale"]
    for tensor in wanting:
        tensor.requires_grad_()
    torch.library.opcheck(overload, arguments)


@eager_only
def test_compiles_as_one_graph_whoever_is_kept(half, device):
    torch._dynamo.reset()
    inputs = make(half, torch.float32, device, 4, 5, [])

    def model(x: Tensor, subset: Tensor) -> Tensor:
        return half.function(**inputs | {"x": x}, **options(half, [], device) | {"subset": subset}).square()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for subset in (torch.tensor([0, 2]), torch.tensor([1, 3])):
        x = inputs["x"].clone().requires_grad_()
        expected, actual = model(x, subset.to(device)), compiled(x, subset.to(device))
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (actual, expected)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"subset": None}, ValueError, r"subset_scale is 1.25 but subset is None"),
        ({"path_scale": torch.ones(4)}, ValueError, r"path_scale and subset are two forms of drop-path"),
        ({"subset": torch.zeros(2, 1, dtype=torch.int64)}, ValueError, r"subset has shape \(2, 1\), expected \(K,\)"),
        (
            {"subset": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"subset has shape \(5,\), expected \(K,\) with K <= 4",
        ),
        ({"subset": torch.zeros(2, dtype=torch.int32)}, TypeError, r"subset is torch.int32, expected torch.int64"),
        ({"subset": torch.zeros(4, dtype=torch.int64)[::2]}, ValueError, r"subset of shape \(2,\) has strides \(2,\)"),
        ({"subset": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, r"subset is on meta but x on cpu"),
    ],
)
def test_bad_input_is_named(half, change, error, message):
    good = make(half, torch.float32, "cpu", 4, 3, []) | options(half, [0, 1], "cpu")
    half.function(**good)
    with pytest.raises(error, match=message):
        half.function(**good | change)
