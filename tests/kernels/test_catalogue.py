"""The catalogue has every differentiable op, with tensors that its kernels take and that leave nothing out."""

from __future__ import annotations

import pkgutil

import pytest
import torch

from deitfast import kernels
from deitfast.kernels import loss
from deitfast.kernels.catalogue import MODELS, OPS, Draw, Shape
from deitfast.kernels.gradient_free import GRADIENT_FREE
from deitfast.kernels.image_ops import CODES

SHAPE = Shape(width=64, heads=1, tokens=6, batch=8, prefix=2, patch_size=4, classes=10)


def test_every_public_op_is_in_it():
    losses = {name for name in vars(loss) if name.startswith("mixed_") and hasattr(loss, f"{name}_reference")}
    assert OPS.keys() == {*kernels.__all__, *losses}


def test_an_op_and_its_module_have_names_of_their_own():
    """`import deitfast.kernels.X as m` gives the module X, and `deitfast.kernels.X` an op."""
    modules = {module.name for module in pkgutil.iter_modules(kernels.__path__)}
    assert not modules & set(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


@pytest.mark.parametrize("name", OPS)
def test_an_op_gives_what_its_reference_gives_and_a_gradient_for_every_input(name, device):
    op = OPS[name]
    tensors = op.inputs(Draw(0, torch.float32, device), SHAPE)
    leaves = {k: t.requires_grad_(k not in op.constants) for k, t in tensors.items()}
    out, expected = (f(**leaves, **op.options(SHAPE)) for f in (op.function, op.reference))
    assert out.shape == op.out(SHAPE)
    assert out.device.type == device.type
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if wanting := [t for t in leaves.values() if t.requires_grad]:
        assert all(bool(gradient.any()) for gradient in torch.autograd.grad(out.square().sum(), wanting))
    assert all(len(tensors[k]) == SHAPE.batch for k in op.per_sample & tensors.keys())


@pytest.mark.parametrize("name", GRADIENT_FREE)
def test_an_op_without_gradients_gives_what_its_reference_gives(name, device):
    op = GRADIENT_FREE[name]
    tensors = op.inputs(Draw(0, torch.float32, device), SHAPE)
    assert op.constants >= tensors.keys()
    out, expected = (f(**tensors, **op.options(SHAPE)) for f in (op.function, op.reference))
    torch.testing.assert_close(out, expected, rtol=0 if op.exact else 1e-5, atol=0 if op.exact else 1e-7)
    if not op.exact:
        assert (out["skipped"], out["steps"]) == (1, 3)
        assert not torch.equal(out["master"], tensors["master"])


def test_the_images_get_every_operation_and_none_but_the_first_is_a_blur():
    code = GRADIENT_FREE["image_ops"].inputs(Draw(0, torch.float32), SHAPE)["plan"][..., 0]
    assert set(code[0].tolist()) == set(CODES.values())
    assert set(code[2].tolist()) == set(CODES.values()) - {CODES["skip"], CODES["blur"]}
    assert not (code[1:] == CODES["blur"]).any()
    assert ((code[0] == CODES["skip"]) & (code[1] == CODES["skip"])).any()


@pytest.mark.parametrize(("tokens", "prefix", "pixels"), [(197, 1, 224), (198, 2, 224), (577, 1, 384), (578, 2, 384)])
@pytest.mark.parametrize("model", MODELS)
def test_deits_shapes_are_those_of_its_images(model, tokens, prefix, pixels):
    shape = Shape.of(model, tokens, 3)
    assert (shape.prefix, shape.pixels, shape.width // shape.heads) == (prefix, pixels, 64)
    assert shape.key() == {"model": model, "tokens": tokens, "batch": 3}


def test_erased_and_mixed_rectangles_lie_inside_the_image():
    tensors = OPS["input_patches"].inputs(Draw(1, torch.float32), Shape.of("Ti", 197, 256))
    for name in ("erase", "mix_box"):
        boxes = tensors[name]
        assert 0.2 < float((boxes[:, 2] > 0).float().mean()) < 0.6
        assert int(boxes.min()) == 0
        assert int((boxes[:, :2] + boxes[:, 2:]).max()) <= 224
    assert torch.equal(tensors["mix_box"][::2], tensors["mix_box"][1::2]), "the images of a pair exchange one rectangle"
