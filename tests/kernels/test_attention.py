"""attention against float64: outputs, gradients, layouts, launch paths, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deitfast.kernels import attention, attention_op
from deitfast.kernels.attention_op import (
    HEAD_DIMS,
    INTERPRETER,
    LAUNCHES,
    attention_bwd,
    attention_bwd_op,
    attention_fwd,
    attention_fwd_op,
    attention_launch,
    attention_reference,
)
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.tunable import picked, selection
from tests.kernels.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, and the interpreter is slow")


def attention64(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """The definition in float64, written out."""
    *leading, tokens, width = qkv.shape
    q, k, v = qkv.double().reshape(*leading, tokens, 3, num_heads, width // 3 // num_heads).unbind(-3)
    scores = torch.einsum("...nhd,...mhd->...hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("...hnm,...mhd->...nhd", scores.softmax(-1), v).flatten(-2)


def run(function: Any, qkv: Tensor, dout: Tensor, num_heads: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output and gradient of qkv."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, num_heads, scale)
    (gradient,) = torch.autograd.grad(out, qkv, dout.to(out.dtype))
    return out.detach(), gradient


def launch_by(arch: int) -> Any:
    """The kernels called directly, with the launch table of another chip."""

    def function(qkv: Tensor, num_heads: int, scale: float | None) -> Tensor:
        factor = scale or (qkv.shape[-1] // 3 // num_heads) ** -0.5

        class Launched(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, qkv: Tensor) -> Tensor:
                out, lse = attention_fwd(qkv, num_heads, factor, arch=arch)
                ctx.save_for_backward(qkv, out, lse)
                return out

            @staticmethod
            def backward(ctx: Any, dout: Tensor) -> Tensor:
                return attention_bwd(dout, *ctx.saved_tensors, num_heads, factor, arch=arch)[0]

        return Launched.apply(qkv)

    return function


def check(qkv: Tensor, num_heads: int, scale: float | None = None, op: Any = attention) -> None:
    """Output and all three gradients of `op` against float64 and eager PyTorch."""
    dout = torch.randn(*qkv.shape[:-1], qkv.shape[-1] // 3, generator=torch.Generator().manual_seed(1)).to(qkv)
    out, gradient = run(op, qkv, dout, num_heads, scale)
    out64, gradient64 = run(attention64, qkv.double(), dout.double(), num_heads, scale)
    out_eager, gradient_eager = run(attention_reference, qkv, dout, num_heads, scale)
    assert_close_to_float64("out", out, out64, out_eager, factor=2)
    parts = zip("qkv", *(g.chunk(3, dim=-1) for g in (gradient, gradient64, gradient_eager)), strict=True)
    for name, part, part64, part_eager in parts:
        assert_close_to_float64(f"d{name}", part, part64, part_eager, factor=3, magnitude=gradient64)


def random_qkv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "head_dim"),
    [
        (1, 1, 3, 64),
        (3, 2, 3, 64),
        (1, 17, 12, 32),
        (2, 64, 3, 80),
        (1, 65, 2, 96),
        (1, 129, 1, 64),
        (1, 192, 1, 32),
        (1, 197, 12, 64),
        (3, 197, 3, 64),
        (1, 198, 6, 64),
        (1, 209, 1, 64),
        (1, 255, 2, 32),
        (2, 256, 1, 64),
        (1, 200, 1, 128),
        (1, 257, 1, 128),
        (1, 577, 1, 64),
        (1, 578, 1, 64),
    ],
)
def test_matches_float64(device, dtype, batch, tokens, heads, head_dim):
    check(random_qkv((batch, tokens, 3 * heads * head_dim), dtype, device), heads)


def launch_keys() -> list[Any]:
    """One case for each entry of the launch tables that differ, at a size that fills more than one block."""
    cases = []
    for arch in (0, 90):
        for itemsize, columns in sorted({key for launches in LAUNCHES[arch].values() for key in launches}):
            for tokens in (70, 150, 197, 230) if (itemsize, columns) == (2, 64) else (70,):
                cases.append(
                    pytest.param(arch, itemsize, columns, tokens, id=f"{arch}-{8 * itemsize}bit-{columns}-{tokens}")
                )
    return cases


@pytest.mark.parametrize(("arch", "itemsize", "columns", "tokens"), launch_keys())
def test_every_launch_table(device, arch, itemsize, columns, tokens):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the kernels need CUDA or TRITON_INTERPRET=1")
    if device.type == "cuda" and arch == 90 and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("this chip has no TMA")
    half = torch.float16 if INTERPRETED else torch.bfloat16
    head_dim = {64: 64, 128: 80}[columns]
    qkv = random_qkv((1, tokens, 3 * head_dim), half if itemsize == 2 else torch.float32, device)
    check(qkv, 1, op=launch_by(arch))


@pytest.mark.skipif(not INTERPRETED, reason="no GPU has room for these kernels in fp32")
@pytest.mark.parametrize("tokens", [130, 197, 250])
def test_whole_head_kernels_in_fp32(tokens, monkeypatch):
    """The kernels of DeiT's shape, at a precision where a slip of 1e-5 shows."""
    short = {kernel: {(4, 64): launches[2, 64]} for kernel, launches in LAUNCHES[90].items()}
    monkeypatch.setitem(LAUNCHES, INTERPRETER, short)
    check(random_qkv((1, tokens, 3 * 2 * 64), torch.float32), 2)


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernel of sm_90 on what is no GPU")
@pytest.mark.parametrize(("tokens", "dtype"), [(150, torch.float16), (197, torch.float32), (230, torch.float16)])
def test_the_backward_with_transposed_scores(tokens, dtype):
    """Offered beside the table's, which has what is longer than 208 tokens."""
    offered = selection(attention_launch, INTERPRETER, "bwd_short", 2, 64)
    (entry,) = (x for x in offered.others if x is not None and "LAST" in x.tiles)
    with picked({offered.name.replace("itemsize=2", f"itemsize={dtype.itemsize}"): entry}):
        check(random_qkv((1, tokens, 3 * 64), dtype), 1)


@pytest.mark.parametrize("tokens", [70, 197])
def test_peaked_softmax(device, dtype, tokens):
    """Logits with a standard deviation of about 8: rows are nearly one-hot."""
    check(random_qkv((1, tokens, 3 * 2 * 64), dtype, device), 2, scale=1.0)


@pytest.mark.parametrize("tokens", [70, 197])
def test_outlier_channels(device, dtype, tokens):
    """Channels of 50 standard deviations in v and of 10 in q and k, offsets of 3, as trained transformers have them."""
    qkv = random_qkv((1, tokens, 3, 2, 64), torch.float32)
    qkv[:, :, :2, :, 5] *= 10
    qkv[:, :, 2, :, 7] *= 50
    qkv[:, :, 2, :, 9] += 3
    check(qkv.flatten(2).to(device, dtype), 2)


@pytest.mark.parametrize("tokens", [70, 197, 257])
def test_padding_keys_stay_out_where_all_logits_are_very_negative(device, dtype, tokens):
    """Real logits near -300: a padding key of logit 0 would take the whole softmax, or overflow in the backward."""
    qkv = random_qkv((1, tokens, 3, 1, 64), torch.float32) * 0.5
    qkv[:, :, 0] += 6
    qkv[:, :, 1] -= 6
    check(qkv.flatten(2).to(device, dtype), 1)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3), (1, 1, 2)])
def test_leading_shapes(device, leading):
    qkv = random_qkv((*leading, 5, 3 * 64), torch.float32, device)
    out, gradient = run(attention, qkv, torch.ones(1, device=device).expand(*leading, 5, 64), 2, None)
    assert out.shape == (*leading, 5, 64)
    assert gradient.shape == qkv.shape
    if qkv.numel():
        check(qkv, 2)


def test_strided_and_unaligned_inputs(device):
    """Transposed batch and tokens, rows of a wider tensor, a start that is not 16-byte aligned, an expanded batch."""
    wide = random_qkv((3, 20, 3 * 64 + 8), torch.float16, device)
    for qkv in (
        wide.transpose(0, 1)[..., : 3 * 64],
        wide[:, ::2, : 3 * 64],
        wide[..., 3 : 3 + 3 * 64],
        wide.flatten()[1 : 1 + 2 * 20 * 3 * 64].view(2, 20, 3 * 64),
        wide[:1, :, : 3 * 64].expand(3, -1, -1),
    ):
        check(qkv, 2)


def test_any_layout_of_the_incoming_gradient(device):
    qkv = random_qkv((2, 20, 3 * 64), torch.float32, device).requires_grad_()
    weight = random_qkv((2, 64, 20), torch.float32, device, seed=1)
    for loss in (
        lambda out: out.sum(),
        lambda out: (out.transpose(1, 2) * weight).sum(),
        lambda out: out[:, 3].square().sum(),
        lambda out: out.unflatten(-1, (4, 16)).permute(0, 3, 1, 2)[::2].square().mean(),
    ):
        actual, expected = (
            torch.autograd.grad(loss(function(qkv, 2)), qkv)[0] for function in (attention, attention_reference)
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_same_bits_in_every_run(device, dtype):
    qkv = random_qkv((2, 197, 3 * 64), dtype, device)
    dout = random_qkv((2, 197, 64), dtype, device, seed=1)
    first, second = (run(attention, qkv, dout, 1, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_uses_in_one_graph(device):
    qkv = random_qkv((1, 9, 3 * 64), torch.float32, device).requires_grad_()

    def twice(function: Any) -> Tensor:
        first = function(qkv, 2)
        return (first * function(first.repeat(1, 1, 3) + qkv, 1)).sum()

    actual, expected = (torch.autograd.grad(twice(function), qkv)[0] for function in (attention, attention_reference))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_without_gradients_nothing_is_kept(device):
    qkv = random_qkv((1, 9, 3 * 64), torch.float32, device).requires_grad_()
    with torch.no_grad():
        assert attention(qkv, 2).grad_fn is None
    assert attention(qkv.detach(), 2).grad_fn is None
    before = qkv.detach().clone()
    attention(qkv, 2).sum().backward()
    assert torch.equal(qkv, before), "the op changed its input"


def test_input_and_its_version_are_guarded():
    """qkv changed between forward and backward is an error, as for any op that saves it."""
    leaf = random_qkv((1, 9, 3 * 64), torch.float32).requires_grad_()
    qkv = leaf * 1
    out = attention(qkv, 2)
    qkv.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@eager_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    qkv = random_qkv((1, 9, 3 * 64), torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = attention(qkv, 2)
    assert out.dtype == dtype
    out.sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.dtype == torch.float32


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 150 if INTERPRETED else 600),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scale=st.sampled_from([None, 0.02, 0.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_shapes(batch, tokens, heads, head_dim, dtype, scale, seed):
    if INTERPRETED and batch * tokens * heads > 400:
        batch = heads = 1
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    check(random_qkv((batch, tokens, 3 * heads * head_dim), dtype, device, seed), heads, scale)


def test_reference_is_the_definition():
    for heads, head_dim, scale in ((2, 16, None), (1, 40, 0.3)):
        qkv = random_qkv((2, 3, 7, 3 * heads * head_dim), torch.float64)
        torch.testing.assert_close(attention_reference(qkv, heads, scale), attention64(qkv, heads, scale))


def test_triton_kernels_run_exactly_where_they_should(device, monkeypatch):
    """On CUDA and under TRITON_INTERPRET=1 the public op launches the kernels meant for the shape; else none."""
    launched: list[str] = []
    original = attention_op._run
    monkeypatch.setattr(
        attention_op, "_run", lambda kernel, *args: (launched.append(kernel.__name__), original(kernel, *args))
    )
    for tokens, backward in ((130, ["bwd_short"]), (7, ["bwd_dq", "bwd_dkdv"])):
        launched.clear()
        qkv = random_qkv((1, tokens, 3 * 32), torch.float16, device).requires_grad_()
        attention(qkv, 1).sum().backward()
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
            assert launched, "no kernel ran"
            continue
        forward = ["fwd_short"] if tokens == 130 else ["fwd"]
        expected = [f"attention_{stage}_kernel" for stage in forward + backward]
        assert launched == (expected if INTERPRETED or device.type == "cuda" else [])


@eager_only
def test_opcheck(device):
    qkv = random_qkv((2, 5, 3 * 64), torch.float32, device)
    dout = random_qkv((2, 5, 64), torch.float32, device, seed=1)
    out, lse = attention_fwd_op(qkv, 2, 0.2)
    torch.library.opcheck(attention_fwd_op, (qkv.clone().requires_grad_(), 2, 0.2))
    torch.library.opcheck(attention_bwd_op, (dout, qkv, out, lse, 2, 0.2))


@eager_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(device, dynamic):
    def model(qkv: Tensor) -> Tensor:
        return attention(qkv * 2, 2, scale=0.2) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 3 * 64), (3, 4, 3 * 64)):
        qkv = random_qkv(shape, torch.float32, device).requires_grad_()
        expected, actual = model(qkv), compiled(qkv)
        torch.testing.assert_close(actual, expected)
        gradients = (torch.autograd.grad(out.square().sum(), qkv)[0] for out in (actual, expected))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("qkv", "arguments", "error", "message"),
    [
        (torch.zeros(2, 4, 3 * 64), (5,), ValueError, r"num_heads is 5; width 64 takes \[2, 1\].*32, 64, 80, 96, 128"),
        (torch.zeros(2, 4, 3 * 48), (1,), ValueError, r"num_heads is 1; width 48 takes none"),
        (torch.zeros(2, 4, 3 * 64), (0,), ValueError, r"num_heads is 0"),
        (torch.zeros(2, 4, 64), (1,), ValueError, r"\(2, 4, 64\); its last dimension must be a multiple of 3"),
        (torch.zeros(192), (1,), ValueError, r"shape \(192,\), expected \(\.\.\., tokens, 3 \* width\)"),
        (torch.zeros(2, 192, 4).mT, (1,), ValueError, r"shape \(2, 4, 192\) has strides .* must be contiguous"),
        (torch.zeros(2, 4, 192).double(), (1,), TypeError, r"qkv is torch.float64"),
        (torch.zeros(2, 4, 192), (1, 0.0), ValueError, r"scale is 0.0; it must be positive"),
        (torch.zeros(2, 4, 192), (1, math.nan), ValueError, r"scale is nan"),
    ],
)
def test_bad_input_is_named(qkv, arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        attention(qkv, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter refuses bfloat16")
def test_interpreter_refuses_bfloat16():
    with pytest.raises(TypeError, match="interpreter multiplies wrongly"):
        attention(torch.zeros(1, 4, 192, dtype=torch.bfloat16), 1)
