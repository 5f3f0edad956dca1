"""The step engine against the plain loop: same losses, same weights, at one and two processes; faults; capture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deitfast.data import Batch
from deitfast.distributed import World
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import UNCAPTURED_STEPS, Engine, FlatEngine, PlainEngine, make_engine
from deitfast.model.deit import DeiT
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from tests.processes import in_processes

# Every mechanism that a step has is on. With its usual epsilon Adam turns a gradient that is zero but for rounding (a
# key's bias, say) into a step of the size of the learning rate, and two ways to add up the same numbers drift apart.
# The larger one here keeps 20 steps comparable to 1e-6; one test has the usual one at a small learning rate.
RECIPE = replace(
    Recipe(), model="deit_digits_patch4_16", data="digits", batch=32, mix_group=8, drop_path=0.3, ema_decay=0.9,
    workers=1, rand_augment="none", clip_norm=0.5, smoothing=0.1, adam_eps=1e-3,
)  # fmt: skip
LR = 1e-3


def make_model(recipe: Recipe) -> DeiT:
    torch.manual_seed(0)
    return create_model(recipe.model, num_classes=10, drop_path=recipe.drop_path, depth=2).train()


def world_of(rank: int = 0, size: int = 1, device: str = "cpu") -> World:
    return World(rank, size, rank, torch.device(device))


def batches(recipe: Recipe, micro_batch: int, world: World, steps: int) -> Iterator[Batch]:
    """This process's micro-batches of random images, mixed and erased; the global batch depends on the step alone."""
    n, side = recipe.batch, 16
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (n,), generator=generator)
        group = torch.arange(n) // recipe.mix_group
        cut = group % 2 == 0  # these groups cutmix, the others mixup
        lam = torch.where(cut, 1 - 42 / side**2, torch.rand(n, generator=generator)[group])
        mix_box = torch.tensor([2, 3, 6, 7]) * cut[:, None]
        erase = torch.tensor([1, 4, 5, 8]) * (torch.rand(n, generator=generator) < 0.3)[:, None]
        for micro in range(n // world.size // micro_batch):
            first = world.rank * (n // world.size) + micro * micro_batch
            part = slice(first, first + micro_batch)
            index = torch.arange(n)[part]
            tensors = {"images": images, "labels": labels, "lam": lam, "mix_box": mix_box, "erase": erase}
            yield Batch(
                step=step, slots=index.numpy(), epoch=torch.tensor([step // 3], device=world.device),
                index=index.to(world.device), view=(index % 3).to(world.device),
                **{name: tensor[part].contiguous().to(world.device) for name, tensor in tensors.items()},
            )  # fmt: skip


def run(
    recipe: Recipe, steps: int, accumulation: int = 2, world: World | None = None, lr: float = LR
) -> tuple[list[float], Engine]:
    """Losses of every step (summed over the processes) and the engine after it."""
    world = world or world_of()
    micro_batch = recipe.batch // world.size // accumulation
    model = make_model(recipe).to(world.device)
    engine = make_engine(
        model, recipe, world, DropPath(model, recipe, micro_batch),
        accumulation=accumulation, bf16=recipe.precision == "bf16",
    )  # fmt: skip
    if world.rank:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)  # whatever another process begins with
    engine.broadcast()
    losses = []
    source = batches(recipe, micro_batch, world, steps)
    for step in range(steps):
        engine(source, step, lr)
        losses.append(world.sum(engine.pop_loss()[0]).item())
    return losses, engine


def assert_same_state(one: Engine, two: Engine, rtol: float, atol: float) -> None:
    first, second = one.tensors(), two.tensors()
    assert first.keys() == second.keys()
    for stem, tensors in first.items():
        assert tensors.keys() == second[stem].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, second[stem][name], rtol=rtol, atol=atol, msg=f"{stem} {name}")


@pytest.mark.parametrize(("adam_eps", "lr"), [(1e-3, LR), (1e-8, 1e-5)])
def test_twenty_steps_equal_the_plain_loop(adam_eps: float, lr: float) -> None:
    recipe = replace(RECIPE, adam_eps=adam_eps)
    plain_losses, plain = run(replace(recipe, engine="plain"), 20, lr=lr)
    flat_losses, flat = run(replace(recipe, engine="flat"), 20, lr=lr)
    assert isinstance(plain, PlainEngine)
    assert isinstance(flat, FlatEngine)
    assert flat_losses == pytest.approx(plain_losses, rel=1e-6)
    first, second = plain.tensors(), flat.tensors()
    for stem in ("model", "ema"):
        for name, tensor in first[stem].items():
            torch.testing.assert_close(second[stem][name], tensor, rtol=0, atol=1e-6, msg=f"{stem} {name}")


def test_a_checkpoint_of_one_engine_continues_in_the_other() -> None:
    for first, second in itertools.permutations(("plain", "flat")):
        _, source = run(replace(RECIPE, engine=first), 3)
        state = {stem: {k: t.clone() for k, t in tensors.items()} for stem, tensors in source.tensors().items()}
        model, recipe = make_model(RECIPE), replace(RECIPE, engine=second)
        target = make_engine(model, recipe, world_of(), DropPath(model, recipe, 16), accumulation=2, bf16=False)
        target.load(state)
        again = target.tensors()
        assert {stem: tensors.keys() for stem, tensors in again.items()} == {s: t.keys() for s, t in state.items()}
        assert all(
            torch.equal(again[s][name], tensor) for s, tensors in state.items() for name, tensor in tensors.items()
        )


@pytest.mark.slow
def test_at_two_processes_too_the_engine_equals_the_plain_loop(tmp_path: Path) -> None:
    losses, _ = run(replace(RECIPE, engine="flat"), 20)
    in_processes(_rank, 2, str(tmp_path / "found"))
    found = torch.load(tmp_path / "found", weights_only=True)
    flat, plain = found["flat"], found["plain"]
    assert flat["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert flat["losses"] == pytest.approx(losses, rel=1e-6)
    for name, tensor in plain["model"].items():
        torch.testing.assert_close(flat["model"][name], tensor, rtol=0, atol=1e-6, msg=name)
    for name, gradient in plain["gradients"].items():
        torch.testing.assert_close(flat["gradients"][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def _rank(rank: int, out: str) -> None:
    """One of two processes: 20 steps, and the first gradient, of both engines."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    world, found = world_of(rank, 2), {}
    for name in ("flat", "plain"):
        losses, engine = run(replace(RECIPE, engine=name), 20, world=world)
        model = {key: tensor.clone() for key, tensor in engine.tensors()["model"].items()}
        gradients = _one_gradient(replace(RECIPE, engine=name), world)
        found[name] = {"losses": losses, "model": model, "gradients": gradients}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def _one_gradient(recipe: Recipe, world: World) -> dict[str, torch.Tensor]:
    """The reduced gradient of the first step, by name."""
    model = make_model(recipe)
    engine = make_engine(model, recipe, world, DropPath(model, recipe, 8), accumulation=2, bf16=False)
    if isinstance(engine, FlatEngine):
        engine.flat.update = lambda _: None  # type: ignore[method-assign]
    else:
        assert isinstance(engine, PlainEngine)
        engine.optimizer.step = lambda: None  # type: ignore[method-assign, assignment]
        engine.optimizer.zero_grad = lambda: None  # type: ignore[method-assign, assignment]
        engine.recipe = replace(recipe, clip_norm=0.0)
    engine(batches(recipe, 8, world, 1), 0, LR)
    if isinstance(engine, FlatEngine):
        whole = torch.empty(engine.flat.shards.size)
        engine.flat.shards.gather(engine.flat.reduced, whole)
        return {name: gradient.clone() for name, gradient in engine.flat._views(whole)}
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [{}, {"recompute": True}, {"mixup": 0.0, "cutmix": 0.0}], ids=str)
def test_accumulation_recomputation_and_mixing_do_not_change_the_function(change: dict) -> None:
    base = replace(RECIPE, engine="flat", **change)
    one, first = run(base, 3, accumulation=1)
    four, second = run(replace(base, recompute=False), 3, accumulation=4)
    assert one == pytest.approx(four, rel=1e-5)
    for name, tensor in first.tensors()["model"].items():
        torch.testing.assert_close(second.tensors()["model"][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_bf16_follows_fp32() -> None:
    exact, _ = run(replace(RECIPE, engine="flat"), 5)
    rounded, engine = run(replace(RECIPE, engine="flat", precision="bf16"), 5)
    assert rounded == pytest.approx(exact, rel=2e-2)
    assert isinstance(engine, FlatEngine)
    assert {p.dtype for p in engine.compute.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}


def test_weight_gradients_are_summed_in_fp32() -> None:
    """What the engine asks of cuBLAS, and why: 16 parts of the sum over 512 images' tokens, rounded to bf16 or not."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True  # torch's default
    run(RECIPE, 0)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    generator = torch.Generator().manual_seed(0)
    dout, x = (torch.randn(16, 512 * 197 // 16, 24, generator=generator).bfloat16() for _ in range(2))
    exact = torch.einsum("pkm,pkn->mn", dout.double(), x.double())
    parts = dout.float().transpose(1, 2) @ x.float()
    rounded = torch.zeros_like(parts[0]).bfloat16()
    for part in parts:
        rounded += part.bfloat16()

    def distance(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    once = distance(exact.bfloat16())
    assert distance(parts.sum(0).bfloat16()) < 1.01 * once
    assert distance(rounded) > 1.5 * once


def test_subset_drop_path_trains() -> None:
    recipe = replace(RECIPE, engine="flat", drop_path_form="subset", mix_group=16)
    one, _ = run(recipe, 4, accumulation=1)
    two, _ = run(recipe, 4, accumulation=2)
    assert one == pytest.approx(two, rel=1e-5)


def test_a_step_that_is_not_finite_is_skipped_counted_and_ten_in_a_row_are_hopeless() -> None:
    recipe = replace(RECIPE, engine="flat")
    _, engine = run(recipe, 2)
    assert isinstance(engine, FlatEngine)
    before = {stem: {k: t.clone() for k, t in tensors.items()} for stem, tensors in engine.tensors().items()}
    original = engine.loss
    engine.loss = lambda inputs: original(inputs) * float("nan")  # type: ignore[method-assign]
    source = batches(recipe, 16, world_of(), 12)
    for step in range(2, 11):
        engine(source, step, LR)
    loss, skipped = engine.pop_loss()
    assert (loss.item(), skipped.item()) == (0.0, 9)
    assert not engine.should_stop()
    after = engine.tensors()
    assert all(torch.equal(after[s][k], t) for s, tensors in before.items() for k, t in tensors.items())
    engine(source, 11, LR)
    assert engine.should_stop()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_and_uncaptured_give_the_same_bits(accumulation: int, precision: str) -> None:
    steps = UNCAPTURED_STEPS + 5
    world = world_of(device="cuda")
    results = [
        run(replace(RECIPE, engine=engine, precision=precision), steps, accumulation, world)
        for engine in ("flat", "graph")
    ]
    assert results[0][0] == results[1][0]
    assert_same_state(results[0][1], results[1][1], rtol=0, atol=0)
