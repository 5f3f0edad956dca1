"""Patch projection, prefix tokens and position embedding in one op, against float64 and against the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deitfast.kernels import patch_embed_op
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.patch_embed_op import patch_embed, patch_embed_reference
from deitfast.model.deit import DeiT
from tests.kernels.tolerance import assert_close_to_float64

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
eager_only = pytest.mark.skipif(INTERPRETED, reason="says nothing about the kernels, and the interpreter is slow")
Tensors = dict[str, Tensor]
PARAMETERS = ("weight", "bias", "prefix_tokens", "pos_embed")


def make(
    device: torch.device, dtype: torch.dtype, B: int, P: int, K: int, D: int, prefix: int, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator)).to(device, dtype)

    return {
        "patches": normal(B, P, K),
        "weight": normal(D, K, std=K**-0.5),
        "bias": normal(D, std=0.1),
        "prefix_tokens": normal(prefix, D, std=0.5),
        "pos_embed": normal(prefix + P, D, std=0.5),
    }


def definition(patches: Tensor, weight: Tensor, bias: Tensor, prefix_tokens: Tensor, pos_embed: Tensor) -> Tensor:
    T = len(prefix_tokens)
    rows = torch.einsum("bpk,dk->bpd", patches, weight) + bias + pos_embed[T:]
    return torch.cat([(prefix_tokens + pos_embed[:T]).repeat(len(patches), 1, 1), rows], dim=1)


def results(function: Any, tensors: Tensors, dout: Tensor) -> Tensors:
    """The output, and the gradient of every parameter."""
    leaves = {k: t.detach().clone().requires_grad_(k != "patches") for k, t in tensors.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, [leaves[name] for name in PARAMETERS], dout.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(PARAMETERS, grads, strict=True)}


def check(tensors: Tensors) -> None:
    dout = torch.randn_like(definition(**tensors))
    exact = results(definition, {k: t.double() for k, t in tensors.items()}, dout)
    eager, actual = results(patch_embed_reference, tensors, dout), results(patch_embed, tensors, dout)
    for name, value in actual.items():
        assert_close_to_float64(name, value, exact[name], eager[name], 2 if name == "out" else 3)


SHAPES = {
    "Ti, 197 tokens": (2, 196, 768, 192, 1),
    "Ti, 198 tokens": (1, 196, 768, 192, 2),
    "S": (2, 49, 768, 384, 2),
    "B": (1, 9, 768, 768, 1),
    "patch 4": (3, 36, 48, 64, 1),
    "many short images": (70, 4, 48, 32, 2),
    "one patch an image": (5, 1, 27, 33, 1),
    "nothing divides": (3, 7, 75, 37, 2),
    "no prefix": (2, 5, 12, 16, 0),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(shape, device, dtype):
    check(make(device, dtype, *shape))


@pytest.mark.parametrize("shape", [SHAPES["patch 4"], SHAPES["many short images"], SHAPES["nothing divides"]])
def test_tiles_of_the_gpu(shape, device, monkeypatch):
    """The interpreter usually takes large tiles; here those of a GPU, several along every dimension."""
    monkeypatch.setattr(patch_embed_op, "INTERPRETED", False)
    check(make(device, torch.float32, *shape))
    check(make(device, torch.float16, *shape))


@pytest.mark.parametrize("distilled", [False, True])
def test_is_what_the_model_computes(device, distilled):
    model = DeiT(width=48, depth=1, num_heads=3, image_size=32, patch_size=8, distilled=distilled).to(device)
    images = torch.randn(3, 3, 32, 32, device=device)
    tokens = [model.cls_token, model.dist_token] if distilled else [model.cls_token]
    patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2).contiguous()
    proj = model.patch_embed.proj
    out = patch_embed(patches, proj.weight.flatten(1), proj.bias, torch.cat(tokens, 1)[0], model.pos_embed[0])
    torch.testing.assert_close(out, model.embed(images), rtol=1e-5, atol=1e-5)


def test_any_layout_of_the_incoming_gradient(device):
    tensors = make(device, torch.float32, 3, 9, 20, 24, 2)
    for loss in (lambda out: out.sum(), lambda out: out[:, 0].square().sum(), lambda out: out.mT[..., ::2].sum()):
        gradients = []
        for function in (patch_embed, patch_embed_reference):
            leaves = {k: t.clone().requires_grad_(k != "patches") for k, t in tensors.items()}
            loss(function(**leaves)).backward()
            gradients.append([leaves[name].grad for name in PARAMETERS])
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_same_bits_in_every_run(device, dtype):
    tensors = make(device, dtype, 40, 4, 48, 32, 2)
    dout = torch.randn_like(patch_embed(**tensors))
    first, second = (results(patch_embed, tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strided_and_unaligned_operands(device):
    tensors = make(device, torch.float16, 2, 9, 40, 64, 1)
    wide = torch.nn.functional.pad(tensors["patches"], (3, 5))[..., 3:43]
    weight = torch.nn.functional.pad(tensors["weight"], (0, 3))[:, :40]
    for changed in ({"patches": wide}, {"weight": weight}, {"patches": wide.transpose(0, 1).clone().transpose(0, 1)}):
        given = tensors | changed
        exact = definition(**{name: tensor.double() for name, tensor in given.items()})
        assert_close_to_float64("out", patch_embed(**given), exact, patch_embed_reference(**given), 2)


def test_fp32_stream_beside_16_bit_weights(device):
    tensors = make(device, torch.float16, 2, 9, 40, 64, 2)
    mixed = tensors | {name: tensors[name].float() for name in ("prefix_tokens", "pos_embed")}
    same = {name: tensor.float() for name, tensor in tensors.items()}
    dout = torch.randn_like(patch_embed(**mixed))
    actual, expected = results(patch_embed, mixed, dout), results(patch_embed_reference, same, dout)
    assert [actual[f"d{name}"].dtype for name in PARAMETERS] == [torch.float16] * 2 + [torch.float32] * 2
    for name, value in actual.items():
        error = torch.linalg.vector_norm(value.float() - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 1e-3, name


@eager_only
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast(device, half):
    tensors = make(device, torch.float32, 2, 9, 40, 64, 1)
    leaves = {k: t.clone().requires_grad_(k != "patches") for k, t in tensors.items()}
    with torch.autocast(device.type, half):
        out, expected = patch_embed(**leaves), patch_embed_reference(**tensors)
    assert out.dtype == torch.float32 == expected.dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-2)
    out.sum().backward()
    assert all(leaves[name].grad.dtype == torch.float32 for name in PARAMETERS)


def test_an_empty_batch(device):
    tensors = make(device, torch.float32, 0, 4, 12, 16, 1)
    found = results(patch_embed, tensors, torch.zeros(0, 5, 16, device=device))
    assert found["out"].shape == (0, 5, 16)
    assert not any(found[f"d{name}"].any() for name in PARAMETERS)


def test_runs_the_kernels_exactly_where_it_should(device, monkeypatch):
    launches = []
    for name in ("patch_embed_fwd_kernel", "patch_embed_bwd_kernel"):

        class Spy:
            kernel, called = getattr(patch_embed_op, name), name

            def __getitem__(self, grid: Any) -> Any:
                launches.append(self.called)
                return self.kernel[grid]

        monkeypatch.setattr(patch_embed_op, name, Spy())
    tensors = make(device, torch.float32, 2, 4, 12, 16, 1)
    results(patch_embed, tensors, torch.ones(2, 5, 16, device=device))
    ran = INTERPRETED or device.type == "cuda"
    assert launches == ["patch_embed_fwd_kernel", "patch_embed_bwd_kernel"] * ran


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patches": torch.zeros(4, 12)}, ValueError, r"patches have shape \(4, 12\), expected \(B, P, K\)"),
        ({"patches": torch.zeros(2, 4, 12).requires_grad_()}, ValueError, "patches require a gradient, .* detach"),
        ({"weight": torch.zeros(16, 3, 2, 2)}, ValueError, r"weight has shape \(16, 3, 2, 2\), expected \(D, 12\)"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias has shape \(15,\), expected \(16,\)"),
        ({"prefix_tokens": torch.zeros(1, 1, 16)}, ValueError, r"prefix_tokens have shape .*, expected \(T, D\)"),
        ({"pos_embed": torch.zeros(4, 16)}, ValueError, r"pos_embed has shape \(4, 16\), expected \(5, 16\)"),
        ({"weight": torch.zeros(16, 12).half()}, TypeError, "patches is torch.float32 but weight is torch.float16"),
        ({"pos_embed": torch.zeros(5, 16).half()}, TypeError, "prefix_tokens is torch.float32 but pos_embed is"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=f"patch_embed: {message}"):
        patch_embed(**make(torch.device("cpu"), torch.float32, 2, 4, 12, 16, 1) | change)


@eager_only
def test_opcheck(device):
    tensors = make(device, torch.float32, 2, 3, 12, 16, 2)
    arguments = tuple(t.requires_grad_(name != "patches") for name, t in tensors.items())
    torch.library.opcheck(torch.ops.deitfast.patch_embed.default, arguments)


@eager_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: patch_embed(*t).square() + 1, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for B in (2, 3):
        tensors = make(device, torch.float32, B, 4, 12, 16, 1)
        leaves = [t.requires_grad_(name != "patches") for name, t in tensors.items()]
        actual, expected = compiled(*leaves), patch_embed(*leaves).square() + 1
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(out.sum(), leaves[1:]) for out in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
