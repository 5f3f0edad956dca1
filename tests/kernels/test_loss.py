"""The losses of mixed images against float64 and eager PyTorch with dense target matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.loss import mixed_bce, mixed_bce_reference, mixed_cross_entropy, mixed_cross_entropy_reference
from tests.kernels.tolerance import assert_close_to_float64

Loss = Callable[..., Tensor]

LOSSES: dict[str, tuple[Loss, Loss]] = {
    "cross-entropy, smoothed": (
        partial(mixed_cross_entropy, smoothing=0.1), partial(mixed_cross_entropy_reference, smoothing=0.1)
    ),
    "cross-entropy": (
        partial(mixed_cross_entropy, smoothing=0.0), partial(mixed_cross_entropy_reference, smoothing=0.0)
    ),
    "binary": (mixed_bce, mixed_bce_reference),
}  # fmt: skip
SHAPES = {"one class": (3, 1), "one row": (1, 10), "digits": (5, 10), "ImageNet-1k": (6, 1000)}
LARGE = {"ImageNet-21k": (3, 21841), "one more than a step": (2, 4097)}


def inputs(B: int, C: int, dtype: torch.dtype, device: torch.device, spread: float = 3.0) -> list[Tensor]:
    """Logits, labels, partner labels, lambda; with equal labels in row 0 and lambda at both ends in rows 1 and 2."""
    generator = torch.Generator().manual_seed(B * C)
    logits = torch.randn(B, C, generator=generator).mul_(spread).to(dtype)
    labels, partners = (torch.randint(C, (B,), generator=generator) for _ in range(2))
    partners[0] = labels[0]
    lam = torch.rand(B, generator=generator)
    lam[1:2], lam[2:3] = 1.0, 0.0
    return [t.to(device) for t in (logits, labels, partners, lam)]


def both(loss: Loss, logits: Tensor, *rest: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of `scale` times it."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, *rest)
    return value.detach(), torch.autograd.grad(value * scale, logits)[0]


@pytest.mark.parametrize("shape", SHAPES | LARGE)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("nan_filled_empty")
def test_loss_and_gradient_are_close_to_float64(
    name: str, shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Eager is judged in fp32, in which autocast would compute it, and its gradient is rounded to the logits' dtype."""
    ours, reference = LOSSES[name]
    logits, labels, partners, lam = inputs(*(SHAPES | LARGE)[shape], dtype, device)
    value, gradient = both(ours, logits, labels, partners, lam, scale=2.5)
    value64, gradient64 = both(reference, logits.double(), labels, partners, lam.double(), scale=2.5)
    eager, eager_gradient = both(reference, logits.float(), labels, partners, lam, scale=2.5)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert_close_to_float64("loss", value, value64, eager, 2)
    assert_close_to_float64("dlogits", gradient, gradient64, eager_gradient.to(dtype), 3)


@pytest.mark.parametrize("spread", [100.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits(name: str, spread: float, device: torch.device) -> None:
    """Where exp of a logit overflows or vanishes."""
    ours, reference = LOSSES[name]
    logits, labels, partners, lam = inputs(4, 50, torch.float32, device, spread)
    value, gradient = both(ours, logits, labels, partners, lam)
    value64, gradient64 = both(reference, logits.double(), labels, partners, lam.double())
    eager, eager_gradient = both(reference, logits, labels, partners, lam)
    assert_close_to_float64("loss", value, value64, eager, 2)
    assert_close_to_float64("dlogits", gradient, gradient64, eager_gradient, 3)


@pytest.mark.parametrize("offset", [-10.0, -30.0, 30.0])
def test_binary_loss_keeps_small_terms(offset: float, device: torch.device) -> None:
    """A thousand confident classes: each term is far below an ulp of 1, and so lost in log(1 + x) as written."""
    logits, labels, partners, lam = inputs(3, 1000, torch.float32, device, 0.1)
    logits += offset
    args = labels, partners, lam
    value, gradient = both(mixed_bce, logits, *args)
    value64, gradient64 = both(mixed_bce_reference, logits.double(), labels, partners, lam.double())
    eager, eager_gradient = both(mixed_bce_reference, logits, *args)
    assert_close_to_float64("loss", value, value64, eager, 2)
    assert_close_to_float64("dlogits", gradient, gradient64, eager_gradient, 3)
    target = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0).scatter_(1, partners[:, None], 1.0)
    target[1, partners[1]], target[2, labels[2]] = float(partners[1] == labels[1]), float(partners[2] == labels[2])
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(logits, target), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_with_gaps(name: str, device: torch.device) -> None:
    """Logits that are some columns of a wider tensor, as of a padded head."""
    logits, *rest = inputs(4, 40, torch.float32, device)
    ours, _ = LOSSES[name]
    value, gradient = both(ours, logits, *rest)
    wide = torch.full((4, 48), 1e9, device=device)
    wide[:, :40] = logits
    wide.requires_grad_()
    strided = ours(wide[:, :40], *rest)
    torch.testing.assert_close(strided, value, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(strided, wide)[0][:, :40], gradient, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("wrong", [-1, 10, 2**40, -(2**62)])
@pytest.mark.parametrize("which", ["labels", "partner_labels"])
@pytest.mark.parametrize("name", LOSSES)
def test_label_out_of_range(name: str, which: str, wrong: int, device: torch.device) -> None:
    """On a GPU the row becomes NaN, which the optimiser's finite check catches; on CPU torch refuses the index."""
    ours, _ = LOSSES[name]
    logits, labels, partners, lam = inputs(5, 10, torch.float32, device)
    (labels if which == "labels" else partners)[3] = wrong
    if device.type == "cpu" and not INTERPRETED:
        with pytest.raises(RuntimeError, match="out of bounds"):
            ours(logits, labels, partners, lam)
        return
    value, gradient = both(ours, logits, labels, partners, lam)
    assert value.isnan()
    assert gradient[3].isnan().all()
    assert gradient[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_logit_shows(name: str, value: float, device: torch.device) -> None:
    ours, _ = LOSSES[name]
    logits, labels, partners, lam = inputs(3, 10, torch.float32, device)
    logits[1, (labels[1] + 1) % 10] = value
    assert not ours(logits, labels, partners, lam).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_again(name: str, device: torch.device) -> None:
    ours, _ = LOSSES[name]
    case = inputs(7, 1000, torch.float32, device)
    first, second = both(ours, *case), both(ours, *case)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_ops_follow_torch_library(device: torch.device) -> None:
    logits, labels, partners, lam = inputs(4, 10, torch.float32, device)
    logits.requires_grad_()
    torch.library.opcheck(torch.ops.deitfast.mixed_cross_entropy, (logits, labels, partners, lam, 0.1))
    torch.library.opcheck(torch.ops.deitfast.mixed_bce, (logits, labels, partners, lam))
    dloss, logits = torch.ones((), device=device), logits.detach()
    torch.library.opcheck(torch.ops.deitfast.mixed_bce_bwd, (dloss, logits, labels, partners, lam))
    stats = (torch.zeros(4, device=device), torch.ones(4, device=device))
    torch.library.opcheck(
        torch.ops.deitfast.mixed_cross_entropy_bwd, (dloss, logits, labels, partners, lam, *stats, 0.1)
    )


@pytest.mark.parametrize("loss", [mixed_cross_entropy, mixed_bce])
def test_arguments_that_do_not_fit(loss: Loss) -> None:
    logits, labels, partners, lam = inputs(4, 10, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"logits have shape \(4,\), expected \(B, C\)"):
        loss(logits[:, 0], labels, partners, lam)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\), expected \(4,\)"):
        loss(logits, labels[:3], partners, lam)
    with pytest.raises(TypeError, match=r"partner_labels is torch.int32, expected torch.int64"):
        loss(logits, labels, partners.int(), lam)
    with pytest.raises(TypeError, match=r"lam is torch.float64, expected torch.float32"):
        loss(logits, labels, partners, lam.double())
    with pytest.raises(TypeError, match=r"logits is torch.float64"):
        loss(logits.double(), labels, partners, lam)
    with pytest.raises(ValueError, match=r"last dimension must be contiguous"):
        loss(logits.t().contiguous().t(), labels, partners, lam)
    with pytest.raises(ValueError, match=r"lam requires a gradient"):
        loss(logits, labels, partners, lam.clone().requires_grad_())


def test_smoothing_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"smoothing is 1.5, must be in \[0, 1\]"):
        mixed_cross_entropy(*inputs(4, 10, torch.float32, torch.device("cpu")), smoothing=1.5)
