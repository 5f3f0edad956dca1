"""FlatState: the plain engine's optimiser, average and checkpoints in flat buffers, and the compute copy."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deitfast.engine.flat import FlatState
from deitfast.engine.optim import Ema, load_optimizer_tensors, make_optimizer, optimizer_tensors, set_learning_rate
from deitfast.errors import DeitfastError
from deitfast.kernels.common import INTERPRETED
from deitfast.kernels.flat_buffers import BLOCK
from deitfast.model.deit import DeiT
from deitfast.model.fused import FusedBlock, fuse
from deitfast.recipe import Recipe
from deitfast.training import checkpoint
from deitfast.training.checkpoint import Checkpoint

RECIPE = Recipe(data="digits", lr=3e-3, weight_decay=0.05, clip_norm=0.5, ema_decay=0.99)
STEPS = 4 if INTERPRETED else 20
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter truncates to bfloat16


class Odd(nn.Module):
    """Parameters of awkward sizes: one element, none in a block's last, one past a block; a tied pair; a buffer."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.one = nn.Linear(1, 1)
        self.wide = nn.Linear(33, BLOCK // 32)
        self.pos_embed = nn.Parameter(torch.randn(1, BLOCK))
        self.tied = nn.Linear(1, 1)
        self.tied.weight = self.one.weight
        self.register_buffer("running", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(x).sum(1, keepdim=True) + self.pos_embed.sum()
        return self.scale * self.tied(self.one(hidden)) + self.running.sum().to(x.dtype)


def deit(**settings: object) -> DeiT:
    torch.manual_seed(0)
    return DeiT(
        width=32, depth=2, num_heads=1, image_size=32, num_classes=7, distilled=True, layer_scale=0.1, **settings
    )  # type: ignore[arg-type]


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd()


def recipe(**changes: object) -> Recipe:
    return Recipe(**{**RECIPE.__dict__, **changes})  # type: ignore[arg-type]


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) * 0.1 for p in model.parameters()]


class Plain:
    """What the plain engine does with gradients: clip, optimiser, average."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer, self.ema = make_optimizer(model, recipe), Ema(model, recipe.ema_decay)

    def step(self, grads: Sequence[Tensor], lr: float) -> None:
        for parameter, grad in zip(self.model.parameters(), grads, strict=True):
            parameter.grad = grad.clone() if parameter.requires_grad else None
        if self.recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.ema.update(self.model)


def flat_step(flat: FlatState, model: nn.Module, grads: Sequence[Tensor], lr: float, step: int) -> None:
    flat.zero_grad()
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad.clone() if parameter.requires_grad else None
    flat.gather(first=True)
    flat.update(torch.from_numpy(flat.scalars(lr, step)))


def assert_equal_tensors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], ulps: int, passed: float = 0.0
) -> None:
    """Same names, shapes and dtypes; values apart by so many fp32 ulp of the tensor's largest value at most.

    passed: size of the values on the way, which counts where it is larger: what ends near zero keeps their rounding.
    """
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        error = float((actual[name] - tensor).abs().max())
        limit = ulps * 2.0**-23 * max(float(tensor.abs().max()), passed)
        assert error <= limit, f"{name} is off by {error:.2e}, more than {limit:.2e}"


def assert_same_state(flat: FlatState, plain: Plain) -> None:
    """The same to the rounding that twenty updates gather: 4 ulp of the weights and average, 8 of the moments."""
    assert_equal_tensors(dict(flat.model.state_dict()), dict(plain.model.state_dict()), 4, passed=0.1)
    assert_equal_tensors(flat.ema_tensors(), plain.ema.tensors, 4, passed=0.1)
    ours, theirs = flat.optimizer_tensors(), optimizer_tensors(plain.model, plain.optimizer)
    assert ours.keys() == theirs.keys()
    for key, passed in (("exp_avg.", 0.01), ("momentum_buffer.", 0.01), ("exp_avg_sq.", 0.0), ("step.", 0.0)):
        pair = [{name: t for name, t in tensors.items() if name.startswith(key)} for tensors in (ours, theirs)]
        assert_equal_tensors(*pair, 8, passed=passed)


@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.0}, {"deit_compat": True}], ids=["clipped", "whole", "compat"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("make", [odd, deit])
def test_equals_the_plain_engine(make, optimizer: str, changes: dict[str, object]) -> None:
    if INTERPRETED and make is deit:
        pytest.skip("fifty tensors are slow in the interpreter; the odd ones show as much")
    settings = recipe(optimizer=optimizer, **changes)
    plain = Plain(make(), settings)
    model = make()
    flat = FlatState(model, settings)
    assert flat.compute_model() is model
    for step in range(STEPS):
        grads, lr = gradients(model, step), 1e-3 * (step + 1)
        plain.step(grads, lr)
        flat_step(flat, model, grads, lr, step)
    assert_same_state(flat, plain)


@pytest.mark.usefixtures("timm")
def test_lamb_equals_timm() -> None:
    from timm.optim import Lamb

    settings = recipe(optimizer="lamb", ema_decay=0.0)
    model, other = odd(), odd()
    flat = FlatState(model, settings)
    flat.compute_model()
    decayed, spared = [p for p in other.parameters() if p.ndim > 1], [p for p in other.parameters() if p.ndim <= 1]
    spared.append(decayed.pop([p is other.pos_embed for p in decayed].index(True)))
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": spared, "weight_decay": 0.0}]
    lamb = Lamb(groups, lr=1e-3, betas=(0.9, 0.999), eps=settings.adam_eps, max_grad_norm=settings.clip_norm)
    for step in range(STEPS):
        grads = gradients(model, step)
        for parameter, grad in zip(other.parameters(), grads, strict=True):
            parameter.grad = grad
        lamb.step()
        flat_step(flat, model, grads, 1e-3, step)
    for (name, actual), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_segments_start_at_blocks_and_values_stay() -> None:
    model, before = odd(), odd()
    flat = FlatState(model, RECIPE)
    for (name, parameter), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert parameter.untyped_storage().data_ptr() == flat.master.untyped_storage().data_ptr(), name
        assert parameter.storage_offset() % BLOCK == 0, name
        assert torch.equal(parameter, old), name
    assert flat.master.numel() % BLOCK == 0
    assert model.tied.weight is model.one.weight
    assert flat.norm.shape == flat.skipped.shape == ()


def test_compute_copy_shares_the_flat_memory_and_keeps_the_structure() -> None:
    model = odd()
    flat = FlatState(model, RECIPE, HALF)
    compute = flat.compute_model()
    assert isinstance(compute, Odd)
    assert compute is not model
    assert compute.tied.weight is compute.one.weight
    assert compute.running is model.running
    for (name, copied), master in zip(compute.named_parameters(), model.parameters(), strict=True):
        assert copied.dtype == HALF, name
        assert copied.untyped_storage().data_ptr() == flat.compute.untyped_storage().data_ptr(), name
        assert copied.grad is master.grad is None
        assert torch.equal(copied, master.to(HALF)), name


def test_compute_copy_of_a_fused_deit_keeps_its_class_and_result() -> None:
    model = fuse(deit(), on_cpu=False).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model).to(HALF)(images.to(HALF)) if not INTERPRETED else None
    flat = FlatState(model, RECIPE, HALF)
    compute = flat.compute_model()
    assert all(type(block) is FusedBlock and not block.on_cpu for block in compute.blocks)
    assert [name for name, _ in compute.named_parameters()] == [name for name, _ in model.named_parameters()]
    if expected is not None:
        assert torch.equal(compute(images.to(HALF)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_are_gathered_and_added_as_autograd_adds_them(dtype: torch.dtype, accumulates: bool) -> None:
    flat = FlatState(odd(), RECIPE, dtype, accumulates)
    compute = flat.compute_model()
    reference = copy.deepcopy(compute)
    in_fp32 = accumulates or dtype == torch.float32
    sums = {name: torch.zeros(p.shape, dtype=torch.float32 if in_fp32 else dtype) for name, p in _named(reference)}
    for micro in range(3 if in_fp32 else 1):
        x = torch.randn(4, 33).to(dtype)
        compute(x).sum().backward()
        flat.gather(first=micro == 0)
        assert all(parameter.grad is None for parameter in compute.parameters())
        reference.zero_grad()
        reference(x).sum().backward()
        for name, parameter in _named(reference):
            assert parameter.grad is not None
            sums[name] += parameter.grad
    for (name, total), (_, start) in zip(sums.items(), flat.computed, strict=True):
        assert torch.equal(flat.reduced[start : start + total.numel()], total.flatten()), name
    assert flat.reduced.count_nonzero() == sum(int(total.count_nonzero()) for total in sums.values())


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_parameter_without_a_gradient_counts_as_zero(dtype: torch.dtype, first: bool) -> None:
    flat = FlatState(odd(), RECIPE, dtype, accumulates=True)
    flat.compute_model()
    flat.grad.fill_(3.0)
    flat.reduced.fill_(7.0)
    flat.gather(first)
    for parameter, start in flat.computed:
        assert (flat.reduced[start : start + parameter.numel()] == (0.0 if first else 7.0)).all()


def test_a_part_of_the_gradient_is_gathered_alone() -> None:
    flat = FlatState(odd(), RECIPE)
    compute = flat.compute_model()
    compute(torch.randn(4, 33)).sum().backward()
    (_, start), (last, end) = flat.computed[1], flat.computed[-1]
    flat.gather(True, slice(start, end))
    assert flat.grad[start:end].any()
    assert not flat.grad[:start].any()
    assert not flat.grad[end:].any()
    assert last.grad is not None
    assert flat.computed[1][0].grad is None


def test_what_an_unfinished_step_left_is_forgotten() -> None:
    flat = FlatState(odd(), RECIPE)
    compute = flat.compute_model()
    x = torch.randn(4, 33)
    compute(x).sum().backward()
    flat.gather(first=True)
    once = flat.grad.clone()
    compute(x).sum().backward()
    flat.zero_grad()
    compute(x).sum().backward()
    flat.gather(first=True)
    assert torch.equal(flat.grad, once)


def test_update_refreshes_the_compute_copy_and_its_gradient_counts() -> None:
    """Weights of a half-precision run follow the fp32 update from the rounded gradients."""
    half, single = odd(), odd()
    settings = recipe(clip_norm=0.0)
    flat, exact = FlatState(half, settings, HALF), FlatState(single, settings)
    compute = flat.compute_model()
    exact.compute_model()
    for step in range(3):
        grads = [grad.to(HALF) for grad in gradients(half, step)]
        flat_step(flat, compute, grads, 1e-2, step)
        flat_step(exact, single, [grad.float() for grad in grads], 1e-2, step)
    assert torch.equal(flat.master, exact.master)
    assert torch.equal(flat.compute, flat.master.to(HALF))
    assert not torch.equal(flat.master, FlatState(odd(), settings).master)


def test_accumulation_in_fp32() -> None:
    flat = FlatState(odd(), RECIPE, HALF, accumulates=True)
    flat.compute_model()
    assert flat.reduced is flat.grad_sum
    assert flat.grad_sum is not None
    assert flat.grad_sum.dtype == torch.float32

    def gathered(value: float, first: bool) -> Tensor:
        for parameter, _ in flat.computed:
            parameter.grad = torch.full_like(parameter, value)
        flat.gather(first)
        return torch.cat([flat.reduced[start : start + parameter.numel()] for parameter, start in flat.computed])

    gathered(1.0, first=True)
    assert (gathered(2.0**-11, first=False) == 1 + 2.0**-11).all()  # lost in half precision beside 1
    assert (gathered(2.0**-11, first=True) == 2.0**-11).all()
    flat.grad_sum.zero_()
    flat.update(torch.from_numpy(flat.scalars(1e-3, 0)))
    assert flat.norm == 0  # the sum is what update reads


def test_in_fp32_the_gradient_itself_accumulates() -> None:
    flat = FlatState(odd(), RECIPE, accumulates=True)
    assert flat.grad_sum is None
    assert flat.reduced is flat.grad


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_frozen_parameters_stay(optimizer: str) -> None:
    model = odd()
    model.wide.weight.requires_grad_(False)
    model.scale.requires_grad_(False)
    before = copy.deepcopy(model)
    flat = FlatState(model, recipe(optimizer=optimizer, weight_decay=0.5), HALF)
    compute = flat.compute_model()
    assert [p.requires_grad for p in compute.parameters()] == [p.requires_grad for p in model.parameters()]
    frozen = {"wide.weight", "scale"}
    for step in range(3):
        compute(torch.randn(4, 33).to(HALF)).sum().backward()
        assert {name for name, parameter in compute.named_parameters() if parameter.grad is None} == frozen
        flat.gather(first=True)
        flat.update(torch.from_numpy(flat.scalars(1e-2, step)))
    old, averages = dict(before.named_parameters()), flat.ema_tensors()
    for name, parameter in compute.named_parameters():
        master = model.get_parameter(name)
        assert torch.equal(master, old[name]) == (name in frozen), name
        assert torch.equal(averages[name], old[name]) == (name in frozen), name
        assert torch.equal(parameter, master.to(HALF)), name
    assert flat.grad.numel() < flat.master.numel()
    assert not [name for name in flat.optimizer_tensors() if name.split(".", 1)[1] in frozen]


def test_frozen_parameters_as_in_the_plain_engine() -> None:
    models = odd(), odd()
    for model in models:
        model.wide.weight.requires_grad_(False)
    plain, flat = Plain(models[0], RECIPE), FlatState(models[1], RECIPE)
    flat.compute_model()
    for step in range(3):
        grads = gradients(models[0], step)
        plain.step(grads, 1e-2)
        flat_step(flat, models[1], grads, 1e-2, step)
    assert_same_state(flat, plain)


def test_nonfinite_gradient_changes_nothing_and_is_counted() -> None:
    model = odd()
    flat = FlatState(model, RECIPE, HALF)
    compute = flat.compute_model()
    flat_step(flat, compute, [g.to(HALF) for g in gradients(model, 0)], 1e-2, 0)
    before = [t.clone() for t in (flat.master, flat.compute, flat.exp_avg, flat.exp_avg_sq, flat.ema)]
    grads = [g.to(HALF) for g in gradients(model, 1)]
    grads[0].fill_(float("nan"))
    flat_step(flat, compute, grads, 1e-2, 1)
    assert flat.norm.isnan()
    assert flat.skipped == 1
    after = (flat.master, flat.compute, flat.exp_avg, flat.exp_avg_sq, flat.ema)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("first", ["plain", "flat"])
def test_checkpoints_of_both_engines_are_interchangeable(first: str, optimizer: str, tmp_path: Path) -> None:
    """Three updates in one engine, through the files of a checkpoint into the other, three more in both."""
    settings = recipe(optimizer=optimizer)
    plain, model = Plain(odd(), settings), odd()
    flat = FlatState(model, settings)
    flat.compute_model()
    for step in range(3):
        if first == "plain":
            plain.step(gradients(model, step), 1e-2)
        else:
            flat_step(flat, model, gradients(model, step), 1e-2, step)
    if first == "plain":
        source = {
            "model": plain.model.state_dict(),
            "ema": plain.ema.tensors,
            "optim": optimizer_tensors(plain.model, plain.optimizer),
        }
    else:
        source = {"model": model.state_dict(), "ema": flat.ema_tensors(), "optim": flat.optimizer_tensors()}
    weights = {name: t for name, t in source["model"].items() if name != "tied.weight"}  # one name for one memory
    saved = checkpoint.load(checkpoint.save(tmp_path, Checkpoint(3, {**source, "model": weights}, {}))).tensors
    if first == "plain":
        model.load_state_dict(saved["model"], strict=False)
        flat.load_ema(saved["ema"])
        flat.load_optimizer_tensors(saved["optim"])
        flat.refresh()
    else:
        plain.model.load_state_dict(saved["model"], strict=False)
        plain.ema.load(dict(saved["ema"]))
        load_optimizer_tensors(plain.model, plain.optimizer, dict(saved["optim"]))
    assert_equal_tensors(dict(model.state_dict()), dict(plain.model.state_dict()), 0)
    assert_equal_tensors(flat.optimizer_tensors(), optimizer_tensors(plain.model, plain.optimizer), 0)
    for step in range(3, 6):
        plain.step(gradients(model, step), 1e-2)
        flat_step(flat, model, gradients(model, step), 1e-2, step)
    assert_same_state(flat, plain)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
def test_resumed_run_has_the_same_bits(optimizer: str) -> None:
    settings = recipe(optimizer=optimizer)
    models = odd(), odd()
    flats = [FlatState(model, settings, HALF) for model in models]
    computes = [flat.compute_model() for flat in flats]
    for step in range(2):
        flat_step(flats[0], computes[0], [g.to(HALF) for g in gradients(models[0], step)], 1e-2, step)
    models[1].load_state_dict(models[0].state_dict())
    flats[1].load_optimizer_tensors({k: v.clone() for k, v in flats[0].optimizer_tensors().items()})
    flats[1].load_ema({k: v.clone() for k, v in flats[0].ema_tensors().items()})
    flats[1].refresh()
    for flat, compute in zip(flats, computes, strict=True):
        flat_step(flat, compute, [g.to(HALF) for g in gradients(models[0], 2)], 1e-2, 2)
    for name in ("master", "compute", "ema", "exp_avg"):
        assert torch.equal(getattr(flats[0], name), getattr(flats[1], name)), name


def test_empty_state_clears_the_moments() -> None:
    """The plain engine's state before its first step is empty."""
    model = odd()
    flat = FlatState(model, RECIPE)
    flat.compute_model()
    flat_step(flat, model, gradients(model, 0), 1e-2, 0)
    flat.load_optimizer_tensors({})
    assert not any(tensor.any() for tensor in flat.optimizer_tensors().values())


def test_swap_ema() -> None:
    model = odd()
    flat = FlatState(model, RECIPE, HALF)
    compute = flat.compute_model()
    flat_step(flat, compute, [g.to(HALF) for g in gradients(model, 0)], 1e-1, 0)
    assert flat.ema is not None
    averages = flat.averages()
    assert averages is flat.ema
    weights, average = flat.master.clone(), flat.ema.clone()
    assert not torch.equal(weights, average)
    flat.swap(averages)
    assert torch.equal(flat.master, average)
    assert torch.equal(flat.ema, weights)
    assert torch.equal(flat.compute, average.to(HALF))
    flat.swap(averages)
    assert torch.equal(flat.master, weights)
    assert torch.equal(flat.compute, weights.to(HALF))


def test_without_average() -> None:
    flat = FlatState(odd(), recipe(ema_decay=0.0))
    assert flat.ema is None
    assert flat.ema_tensors() == {}
    with pytest.raises(DeitfastError, match="--ema-decay is 0"):
        flat.averages()


def test_models_and_states_that_do_not_fit() -> None:
    with pytest.raises(DeitfastError, match=r"parameter weight is torch.bfloat16, must be float32"):
        FlatState(nn.Linear(2, 2).bfloat16(), RECIPE)
    with pytest.raises(DeitfastError, match=r"none of the model's 2 parameters requires a gradient"):
        FlatState(nn.Linear(2, 2).requires_grad_(False), RECIPE)
    flat = FlatState(nn.Linear(2, 2), RECIPE)
    with pytest.raises(DeitfastError, match=r"the optimiser's state has no exp_avg.weight"):
        flat.load_optimizer_tensors({"momentum_buffer.weight": torch.zeros(2, 2)})
    with pytest.raises(
        DeitfastError, match=r"weight in the averaged weights has shape \(3, 2\), the model's is \(2, 2\)"
    ):
        flat.load_ema({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
