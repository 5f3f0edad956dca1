"""The flat update against torch's and timm's optimisers, on the same gradients, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.flat_buffers import BLOCK, FlatBuffers, Optimizer, Scalars, Segments
from deitfast.kernels.optimizer import update
from deitfast.kernels.replaced import EAGER, OURS, chosen

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one element": [(1,)],
    "a block but one, a block, one more": [(BLOCK - 1,), (BLOCK,), (BLOCK + 1,)],
    "matrices and vectors": [(70, 33), (7,), (3, 5, 4), (1,), (1, 1500)],
}
LR, BETAS, EPS, DECAY, EMA = 3e-3, (0.9, 0.999), 1e-8, 0.05, 0.99
STEPS = 5 if INTERPRETED else 20
ULP = 2.0**-23


class Flat:
    """Tensors of `shapes` in flat buffers. Tensors of two and more dimensions are decayed."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        optimizer: Optimizer,
        *,
        dtype: torch.dtype = torch.float32,
        copies: bool = False,
        clip: float = 0.0,
        ema: float = EMA,
    ) -> None:
        self.optimizer, self.clip, self.decay = optimizer, clip, ema
        self.shapes = [t.shape for t in tensors]
        decays = [DECAY if t.ndim > 1 else 0.0 for t in tensors]
        device = tensors[0].device
        segments = Segments.of([t.numel() for t in tensors], decays, device)
        size = sum(segments.padded)
        master = torch.zeros(size, device=device)
        self.buffers = FlatBuffers(
            segments=segments,
            grad=torch.zeros(size, dtype=dtype, device=device),
            master=master,
            exp_avg=torch.zeros(size, device=device),
            exp_avg_sq=None if optimizer == "sgd" else torch.zeros(size, device=device),
            ema=torch.zeros(size, device=device) if ema else None,
            compute=torch.zeros(size, dtype=torch.float16, device=device) if copies else None,
            norm=torch.zeros((), device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            steps=torch.zeros((), device=device),
        )
        self.write(master, tensors)
        if self.buffers.ema is not None:
            self.write(self.buffers.ema, tensors)

    def views(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split_with_sizes(self.buffers.segments.padded)
        return [part[: shape.numel()].view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def write(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.copy_(tensor)

    def update(self, grads: Sequence[Tensor], step: int, lr: float = LR) -> None:
        self.write(self.buffers.grad, grads)
        (beta1, beta2), number = BETAS, step + 1
        correction1 = 1 - beta1**number
        values = Scalars(
            lr, number, lr / correction1, correction1, math.sqrt(1 - beta2**number), beta1, 1 - beta1, beta2, 1 - beta2,
            EPS, self.clip, 1 - self.decay,
        )  # fmt: skip
        scalars = torch.tensor(astuple(values), dtype=torch.float32, device=self.buffers.master.device)
        update(self.optimizer, self.buffers, scalars)


def draw(name: str, device: torch.device, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in SHAPES[name]]


def gradients(name: str, device: torch.device, step: int, scale: float = 1e-2) -> list[Tensor]:
    """Of very different sizes from tensor to tensor, and with some exact zeros."""
    grads = draw(name, device, seed=1000 + step)
    return [g.masked_fill_(g.abs() < 0.1, 0.0).mul_(scale * 10.0**-i) for i, g in enumerate(grads)]


def groups(parameters: Sequence[Tensor]) -> list[dict]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def assert_within_ulps(name: str, actual: Tensor, expected: Tensor, ulps: int) -> None:
    """Fail where a value is off by more ulps than that of the largest value."""
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= ulps * ULP * scale, f"{name} is off by {error:.2e}, its largest value is {scale:.2e}"


def torch_adamw(parameters: Sequence[Tensor], clip: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(parameters), lr=LR, betas=BETAS, eps=EPS)


def torch_sgd(parameters: Sequence[Tensor], clip: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups(parameters), lr=LR, momentum=BETAS[0], nesterov=True)


def timm_lamb(parameters: Sequence[Tensor], clip: float) -> torch.optim.Optimizer:
    from timm.optim import Lamb

    return Lamb(groups(parameters), lr=LR, betas=BETAS, eps=EPS, max_grad_norm=clip or None)


REFERENCES: dict[Optimizer, Callable[[Sequence[Tensor], float], torch.optim.Optimizer]] = {
    "adamw": torch_adamw,
    "lamb": timm_lamb,
    "sgd": torch_sgd,
}


@pytest.fixture(autouse=True, params=[OURS, EAGER])
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test also of the form that runs where the kernels are found wrong."""
    with chosen(**dict.fromkeys(REFERENCES, request.param)):
        yield


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("one element", 0.0),
        ("a block but one, a block, one more", 0.01),
        ("a block but one, a block, one more", 1e6),
        ("matrices and vectors", 0.0),
        ("matrices and vectors", 0.01),
    ],
)
@pytest.mark.parametrize("optimizer", REFERENCES)
@pytest.mark.usefixtures("timm")
def test_twenty_updates_are_the_reference_optimizers(
    optimizer: Optimizer, name: str, clip: float, device: torch.device
) -> None:
    tensors = draw(name, device)
    flat = Flat(tensors, optimizer, clip=clip)
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors]
    averages = [t.clone() for t in tensors]
    reference = REFERENCES[optimizer](parameters, clip)
    for step in range(STEPS):
        lr = LR * (1 + step) / STEPS
        grads = gradients(name, device, step)
        flat.update(grads, step, lr)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.get_total_norm(grads)
        if clip and optimizer != "lamb":
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - EMA)
        torch.testing.assert_close(flat.buffers.norm, norm, rtol=1e-6, atol=0.0)
    assert flat.buffers.steps == STEPS
    assert flat.buffers.skipped == 0
    states = [reference.state[p] for p in parameters]
    momentum = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    expected = {"master": parameters, "ema": averages, "exp_avg": [s[momentum] for s in states]}
    if optimizer != "sgd":
        expected["exp_avg_sq"] = [s["exp_avg_sq"] for s in states]
    for what, tensors in expected.items():
        for i, (actual, tensor) in enumerate(zip(flat.views(getattr(flat.buffers, what)), tensors, strict=True)):
            assert_within_ulps(f"{what} {i}", actual, tensor.detach(), 4)


@pytest.mark.parametrize("optimizer", REFERENCES)
def test_padding_stays_zero(optimizer: Optimizer, device: torch.device) -> None:
    name = "matrices and vectors"
    flat = Flat(draw(name, device), optimizer, copies=True)
    for step in range(2):
        flat.update(gradients(name, device, step), step)
    for what in ("master", "exp_avg", "exp_avg_sq", "ema", "compute"):
        buffer = getattr(flat.buffers, what)
        if buffer is not None:
            outside = torch.ones_like(buffer, dtype=torch.bool)
            flat.write(outside, [torch.zeros(shape, device=device) for shape in flat.shapes])
            assert not buffer[outside].any(), what


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("optimizer", REFERENCES)
def test_norm_that_is_not_finite_changes_nothing(optimizer: Optimizer, value: float, device: torch.device) -> None:
    """1e30 is finite, but its square is not in fp32, so neither is the norm."""
    name = "matrices and vectors"
    flat = Flat(draw(name, device), optimizer, copies=True, clip=1.0)
    flat.update(gradients(name, device, 0), 0)
    kept = ("master", "exp_avg", "exp_avg_sq", "ema", "compute", "steps")
    before = {k: getattr(flat.buffers, k).clone() for k in kept if getattr(flat.buffers, k) is not None}
    grads = gradients(name, device, 1)
    grads[-1][0, 1234] = value
    flat.update(grads, 1)
    assert not flat.buffers.norm.isfinite()
    assert flat.buffers.skipped == 1
    for what, tensor in before.items():
        assert torch.equal(getattr(flat.buffers, what), tensor), what
    flat.update(gradients(name, device, 2), 2)
    assert flat.buffers.skipped == 1
    assert flat.buffers.steps == 3
    assert not torch.equal(flat.buffers.master, before["master"])


@pytest.mark.parametrize("optimizer", REFERENCES)
def test_gradients_and_copy_in_half_precision(optimizer: Optimizer, device: torch.device, dtype: torch.dtype) -> None:
    """A 16-bit gradient gives what its values in fp32 give, and the copy is the rounded weights.

    Not in every bit: the two gradients make two kernels. A thread of one holds eight neighbouring values, of the other
    four, so that the squares of the norm are summed in another order; and which multiplication and addition become one
    rounding is the compiler's choice.
    """
    name = "matrices and vectors"
    tensors = draw(name, device)
    flat = Flat(tensors, optimizer, dtype=dtype, copies=True, clip=0.01)
    exact = Flat(tensors, optimizer, clip=0.01)
    for step in range(2):
        grads = [g.to(dtype) for g in gradients(name, device, step)]
        flat.update(grads, step)
        exact.update([g.float() for g in grads], step)
    for what in ("norm", "master", "exp_avg", "ema"):
        assert_within_ulps(what, getattr(flat.buffers, what), getattr(exact.buffers, what), 4)
    assert flat.buffers.compute is not None
    assert torch.equal(flat.buffers.compute, flat.buffers.master.half())


@pytest.mark.parametrize("optimizer", REFERENCES)
def test_same_bits_again_and_without_average(optimizer: Optimizer, device: torch.device) -> None:
    name = "matrices and vectors"
    runs = [Flat(draw(name, device), optimizer, clip=0.01, ema=ema) for ema in (EMA, EMA, 0.0)]
    for step in range(2):
        for flat in runs:
            flat.update(gradients(name, device, step), step)
    for other in runs[1:]:
        assert torch.equal(runs[0].buffers.master, other.buffers.master)


def test_lamb_leaves_zero_weights_and_zero_updates_unadapted(device: torch.device) -> None:
    """The trust ratio is 1 where a norm is 0, so weights that start at zero can leave it."""
    tensors = [torch.zeros(4, 5, device=device), torch.zeros(3, 3, device=device)]
    flat = Flat(tensors, "lamb")
    grads = [torch.full_like(tensors[0], 0.5), torch.zeros_like(tensors[1])]
    flat.update(grads, 0)
    first, second = flat.views(flat.buffers.master)
    torch.testing.assert_close(first, torch.full_like(first, -LR), rtol=1e-6, atol=0.0)
    assert not second.any()


def test_norm_of_many_blocks_is_that_of_float64(device: torch.device) -> None:
    """More blocks than partial sums, of values whose squares span eight decades."""
    size = (BLOCK * 12 if INTERPRETED else BLOCK * 3000) + 17
    grad = torch.logspace(-6, -2, size, dtype=torch.float64).float().to(device)
    flat = Flat([torch.zeros(size, device=device)], "sgd", ema=0.0)
    flat.update([grad], 0)
    expected = torch.linalg.vector_norm(grad.double())
    torch.testing.assert_close(flat.buffers.norm.double(), expected, rtol=1e-6, atol=0.0)
