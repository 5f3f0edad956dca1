"""The update that processes share, against one process that updates everything: the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deitfast.distributed import World
from deitfast.engine import shards
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import FlatEngine
from deitfast.engine.flat import FlatState
from deitfast.engine.shards import Shards
from deitfast.kernels.flat_buffers import BLOCK
from deitfast.recipe import Recipe
from tests import test_step
from tests.processes import in_processes
from tests.test_step import LR, RECIPE, make_model, world_of

STEPS = 20
BUCKET_BYTES = 300_000
"""Of these tests: several buckets, whose ends are no parameters' ends."""
CASES: dict[str, dict[str, object]] = {
    "adamw": {},
    "lamb": {"optimizer": "lamb", "adam_eps": 1e-6},
    "bf16": {"precision": "bf16"},
    "bf16 on the wire": {},
}


def recipe_of(case: str, size: int) -> Recipe:
    return replace(RECIPE, engine="flat", batch=4 * size, mix_group=2, clip_norm=0.1, **CASES[case])  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("elements", [1, BLOCK * 5, BLOCK * 1000 + 17])
def test_shards_are_a_cut(elements: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BUCKET_BYTES", BUCKET_BYTES)
    cuts = [Shards.of(elements, World(rank, size, rank, torch.device("cpu")), BLOCK) for rank in range(size)]
    assert elements <= cuts[0].size < elements + BLOCK * cuts[0].buckets * size
    assert cuts[0].share % BLOCK == 0
    flat = torch.arange(cuts[0].size)
    owned = [cut.own(flat) for cut in cuts]
    assert torch.equal(torch.cat(owned).sort().values, flat)
    for cut, own in zip(cuts, owned, strict=True):
        assert torch.equal(cut.own_blocks(), own[::BLOCK] // BLOCK)
    assert [i for b in range(cuts[0].buckets) for i in range(cuts[0].size)[cuts[0].bounds(b)]] == flat.tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_travels_in_bf16_is_the_sum_of_the_micro_batches_rounded_once(
    precision: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Tensor] = []

    def sum_to_shares(_: World, whole: Tensor, share: Tensor) -> SimpleNamespace:
        sent.append(whole.clone())
        share.copy_(whole[: share.numel()])
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(shards, "BUCKET_BYTES", BUCKET_BYTES)
    monkeypatch.setattr(World, "sum_to_shares", sum_to_shares)
    monkeypatch.setattr(World, "gather_shares", lambda _, share, whole: whole.view(2, -1).copy_(share.expand(2, -1)))
    recipe, world = replace(recipe_of("adamw", 2), precision=precision), world_of(0, 2)
    engines = [engine_of(recipe, replace(world, wire=wire), accumulation) for wire in (torch.float32, torch.bfloat16)]
    sums = []
    for engine in engines:
        sent.clear()
        engine(test_step.batches(recipe, recipe.batch // 2 // accumulation, world, 1), 0, LR)
        sums.append(torch.cat(sent[::-1]))
        assert len(sent) == engine.flat.shards.buckets >= 3
    assert [one.dtype for one in sums] == [torch.float32, torch.bfloat16]
    assert torch.equal(sums[0].bfloat16(), sums[1])
    assert engines[1].flat.reduced.dtype == torch.bfloat16
    assert engines[1].description.endswith("gradients summed in bf16")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_twenty_steps_have_the_bits_of_one_process_that_updates_everything(size: int, tmp_path: Path) -> None:
    in_processes(_rank, size, size, str(tmp_path / "found"))
    found = torch.load(tmp_path / "found", weights_only=True)
    for case in CASES:
        shared, alone = found[case]["shared"], found[case]["alone"]
        assert shared.keys() == alone.keys()
        assert {name.partition(".")[0] for name in shared} == {"model", "optim", "ema"}
        differing = [name for name in shared if not torch.equal(shared[name], alone[name])]
        assert not differing, f"{case}: {differing}"
        moved = torch.cat([shared[n].flatten() - found["before"][n].flatten() for n in found["before"]])
        assert moved.abs().max() > LR
        assert found[case]["clipped"] == STEPS
        assert_taken_up(recipe_of(case, size), shared)


def assert_taken_up(recipe: Recipe, saved: dict[str, Tensor]) -> None:
    """What these processes saved, taken up by 1, 2 and 3 processes, lies there bit by bit, each one's share of it."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        stem, _, rest = name.partition(".")
        tensors.setdefault(stem, {})[rest] = tensor
    alone = engine_of(recipe, world_of())
    alone.load(tensors)
    again = _named(alone.tensors())
    assert again.keys() == saved.keys()
    assert not [name for name in saved if not torch.equal(again[name], saved[name])]
    for world in (world_of(rank, size) for size in (2, 3) for rank in range(size)):
        one = engine_of(recipe, world)
        one.load(tensors)
        for name in ("exp_avg", "exp_avg_sq", "ema", "_own_master", "_own_compute"):
            whole = torch.zeros(one.flat.shards.size, dtype=getattr(one.flat, name).dtype)
            whole[: getattr(alone.flat, name).numel()] = getattr(alone.flat, name)
            assert torch.equal(getattr(one.flat, name), one.flat.shards.own(whole)), f"{name} on {world}"
        assert one.flat._buffers.steps == STEPS


def engine_of(recipe: Recipe, world: World, accumulation: int = 1) -> FlatEngine:
    model = make_model(recipe)
    drop_path = DropPath(model, recipe, recipe.batch // world.size // accumulation)
    bf16 = recipe.precision == "bf16"
    return FlatEngine(model, recipe, world, drop_path, accumulation=accumulation, bf16=bf16)


def _rank(rank: int, size: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=size)
    shards.BUCKET_BYTES = BUCKET_BYTES
    world, found = world_of(rank, size), {}
    for case in CASES:
        wire = torch.bfloat16 if "wire" in case else torch.float32
        found[case] = _both(recipe_of(case, size), replace(world, wire=wire))
    found["before"] = {f"model.{name}": tensor for name, tensor in make_model(RECIPE).state_dict().items()}
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def _both(recipe: Recipe, world: World) -> dict[str, object]:
    """The state after the steps, of the shared update and of an update of everything from the same gradients."""
    alone_model = make_model(recipe)
    alone = FlatState(alone_model, recipe, torch.bfloat16 if recipe.precision == "bf16" else torch.float32, True)
    sums: list[Tensor] = []
    original = FlatState.update

    def update(flat: FlatState, scalars: Tensor) -> None:
        if not flat.shards.is_whole:
            whole = torch.empty(flat.shards.size, dtype=flat.reduced.dtype)
            flat.shards.gather(flat.reduced, whole)
            alone.reduced.copy_(whole[: alone.reduced.numel()])
            sums.append(alone.reduced.norm())
            original(alone, scalars)
        original(flat, scalars)

    FlatState.update = update  # type: ignore[method-assign]
    try:
        _, engine = test_step.run(recipe, STEPS, world=world)
    finally:
        FlatState.update = original  # type: ignore[method-assign]
    assert isinstance(engine, FlatEngine)
    assert engine.flat.shards.buckets >= 3
    assert engine.flat.exp_avg.numel() <= -(-alone.exp_avg.numel() // world.size) + BLOCK * engine.flat.shards.buckets
    shared = _named(engine.tensors())
    whole = {"model": alone_model.state_dict(), "optim": alone.optimizer_tensors(), "ema": alone.ema_tensors()}
    assert torch.equal(engine.flat.compute[: alone.compute.numel()], alone.compute), "another compute copy"
    with engine.weights() as (_, averaged), averaged():
        for name, parameter in engine.model.named_parameters():
            assert torch.equal(parameter, whole["ema"][name]), f"on process {world.rank}: average of {name}"
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, whole["model"][name]), f"on process {world.rank}: {name}"
    clipped = sum(float(norm) > recipe.clip_norm for norm in sums)
    return {"shared": shared, "alone": _named(whole), "clipped": clipped}


def _named(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{stem}.{name}": t.detach().clone() for stem, tensors in state.items() for name, t in tensors.items()}
