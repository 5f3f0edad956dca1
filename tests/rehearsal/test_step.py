"""The step engine on the pretended device: captured and not, its copies, its streams, its launches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from deitfast.distributed import World
from deitfast.engine import shards
from deitfast.engine.drop_path import DropPath
from deitfast.engine.engine import UNCAPTURED_STEPS, Engine, FlatEngine, PlainEngine, make_engine
from deitfast.engine.teacher import load_teacher
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe
from tests.rehearsal import capture, cuda, kernels, memory
from tests.test_step import RECIPE, assert_same_state, batches, world_of

SMALL = replace(RECIPE, batch=16, mix_group=8, engine="graph")
WORLD = world_of(device="cuda")
FIRST_REPLAY = UNCAPTURED_STEPS


def engine_of(recipe: Recipe, accumulation: int = 1, world: World = WORLD, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = create_model(recipe.model, num_classes=10, drop_path=recipe.drop_path, depth=2).train().to(world.device)
    micro_batch = recipe.batch // world.size // accumulation
    return make_engine(
        model, recipe, world, DropPath(model, recipe, micro_batch), accumulation=accumulation,
        bf16=recipe.precision == "bf16", **options,
    )  # fmt: skip


def run(engine: Engine, recipe: Recipe, steps: int, accumulation: int = 1, world: World = WORLD) -> list[float]:
    """Losses of every step."""
    source, found = batches(recipe, recipe.batch // world.size // accumulation, world, steps), []
    for step in range(steps):
        engine(source, step, 1e-3)
        found.append(engine.pop_loss()[0].item())
    return found


@pytest.mark.parametrize(
    ("accumulation", "changes"),
    [
        (1, {"precision": "bf16", "optimizer": "lamb", "drop_path_form": "subset"}),
        (2, {"precision": "bf16", "recompute": True, "loss": "bce", "smoothing": 0.0}),
        (1, {"precision": "fp32", "optimizer": "sgd"}),
    ],
    ids=str,
)
def test_captured_equals_uncaptured_bit_for_bit(accumulation: int, changes: dict[str, Any]) -> None:
    recipe = replace(SMALL, **changes)
    flat, graph = (engine_of(replace(recipe, engine=name), accumulation) for name in ("flat", "graph"))
    assert run(flat, recipe, FIRST_REPLAY + 3, accumulation) == run(graph, recipe, FIRST_REPLAY + 3, accumulation)
    assert_same_state(flat, graph, 0, 0)
    assert isinstance(graph, FlatEngine)
    assert graph._graph is not None
    assert graph._graph.replays == 3


def test_a_distilled_step_is_captured_with_its_teacher() -> None:
    recipe = replace(SMALL, distillation="hard", teacher="deit_digits_patch4_16:fresh")
    losses = []
    for name in ("flat", "graph"):
        teacher = load_teacher(recipe, [str(i) for i in range(10)], WORLD.device, 16)
        engine = engine_of(replace(recipe, engine=name), teacher=teacher)
        losses.append(run(engine, recipe, FIRST_REPLAY + 2))
    assert losses[0] == losses[1]


def test_a_teacher_says_on_a_gpu_what_it_says_on_a_cpu() -> None:
    images, classes = torch.randn(4, 3, 16, 16), [str(i) for i in range(10)]
    recipe = replace(SMALL, distillation="hard", teacher="deit_digits_patch4_16:fresh")
    logits = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        logits.append(load_teacher(recipe, classes, torch.device(device), 16)(images.to(device)).cpu())
    assert (logits[0] - logits[1]).norm() <= 2.0**-5 * logits[1].norm()  # bf16 on a GPU


def test_the_plain_loop_runs_on_a_gpu_as_on_a_cpu() -> None:
    recipe = replace(SMALL, engine="plain")
    found = []
    for world in (WORLD, world_of()):
        engine = engine_of(recipe, world=world)
        assert isinstance(engine, PlainEngine)
        found.append(run(engine, recipe, 2, world=world))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_between_replays_the_average_is_evaluated_and_a_state_loaded() -> None:
    flat, graph = engine_of(replace(SMALL, engine="flat")), engine_of(SMALL)
    assert isinstance(graph, FlatEngine)
    sources = [batches(SMALL, SMALL.batch, WORLD, 8) for _ in range(2)]
    for step in range(8):
        for engine, source in zip((flat, graph), sources, strict=True):
            engine(source, step, 1e-3)
        with graph.weights() as (_, averaged), averaged(), torch.no_grad():
            graph.model.eval()(torch.zeros(2, 3, 16, 16, device="cuda"))
        graph.model.train()
        if step == 5:  # as a resume does it
            graph.load({stem: {k: t.cpu() for k, t in tensors.items()} for stem, tensors in graph.tensors().items()})
    assert_same_state(flat, graph, 0, 0)


def test_a_replayed_step_reads_nothing_from_the_device_and_launches_on_one_stream() -> None:
    engine = engine_of(replace(SMALL, precision="bf16"))
    source = batches(SMALL, SMALL.batch, WORLD, FIRST_REPLAY + 2)
    kernels.LAUNCHES.clear()
    for step in range(FIRST_REPLAY):
        engine(source, step, 1e-3)
    assert isinstance(engine, FlatEngine)
    assert engine._stream is not None
    once = {launch.kernel for launch in kernels.LAUNCHES}
    assert {launch.stream for launch in kernels.LAUNCHES} == {engine._stream.stream_id}
    kernels.LAUNCHES.clear()
    engine(source, FIRST_REPLAY, 1e-3)
    assert {launch.kernel for launch in kernels.LAUNCHES if launch.captured} == once
    assert {launch.stream for launch in kernels.LAUNCHES} == {engine._stream.stream_id}
    kernels.LAUNCHES.clear()
    batch = next(source)
    _, before = memory.copies()
    engine(iter([batch]), FIRST_REPLAY + 1, 1e-3)
    assert memory.copies()[1] == before
    assert not kernels.LAUNCHES


def test_the_second_step_compiles_nothing() -> None:
    recipe = replace(SMALL, precision="bf16")
    engine = engine_of(recipe)
    source = batches(recipe, recipe.batch, WORLD, 2)
    engine(source, 0, 1e-3)
    first = len(kernels.LAUNCHES)
    engine(source, 1, 1e-3)
    assert first
    assert not [launch for launch in kernels.LAUNCHES[first:] if launch.first]


@pytest.mark.parametrize(("accumulation", "additions"), [(1, 3), (2, 5)])
def test_gradients_reach_the_flat_buffer_in_one_call_a_micro_batch(accumulation: int, additions: int) -> None:
    """Not by an addition a parameter to a zeroed buffer; what is added are losses, counters and the second gradient."""
    recipe = replace(SMALL, precision="bf16")
    engine = engine_of(recipe, accumulation)
    run(engine, recipe, FIRST_REPLAY + 1, accumulation)
    assert isinstance(engine, FlatEngine)
    assert engine._graph is not None
    counts = engine._graph.recorder.counts
    assert counts["aten::_foreach_copy_"] == accumulation
    assert counts["aten::add_.Tensor"] == additions < len(engine.flat.computed)
    assert not counts["aten::zero_"]
    assert not counts["aten::new_empty_strided"], "autograd copied a gradient"


@pytest.mark.parametrize("name", ["graph", "flat", "plain"])
def test_the_host_is_at_most_two_steps_ahead(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    engine = engine_of(replace(SMALL, engine=name))
    assert not engine.busy()
    source = batches(SMALL, SMALL.batch, WORLD, 8)
    cuda.EVENTS.clear()
    for step in range(8):
        engine(source, step, 1e-3)
        ends = [number for what, _, number, _ in cuda.EVENTS if what == "record"]
        reached = [number for what, _, number, _ in cuda.EVENTS if what == "synchronize"]
        assert len(ends) == step + 1
        assert reached == ends[: max(step - 1, 0)]
    assert not engine.busy()
    monkeypatch.setattr(cuda.Event, "query", lambda self: False)
    assert engine.busy()


def test_a_closed_engine_holds_no_graph() -> None:
    engine = engine_of(SMALL)
    run(engine, SMALL, FIRST_REPLAY + 1)
    assert isinstance(engine, FlatEngine)
    graph = engine._graph
    assert graph is not None
    engine.close()
    assert engine._graph is None
    assert graph.recorder is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_collectives_start_in_the_backward_on_the_captures_stream(
    monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Two processes, of which this is one; in pretended collectives the other sends zeros and gives nothing."""
    monkeypatch.setattr(shards, "BUCKET_BYTES", 1 << 19)
    calls: list[tuple[str, int, str]] = []
    main = threading.current_thread().name

    class Work:
        def wait(self) -> None:
            calls.append(("wait", torch.cuda.current_stream().stream_id, main))

    def collective(what: str, source: torch.Tensor, target: torch.Tensor) -> Work:
        calls.append((what, torch.cuda.current_stream().stream_id, threading.current_thread().name))

        def copy() -> None:
            memory.on_host(target).copy_(memory.on_host(source))

        for recorder in capture.ACTIVE:
            recorder.record(what, copy, [target])
        if not capture.ACTIVE:
            copy()
        return Work()

    def sum_to_shares(self: World, whole: torch.Tensor, share: torch.Tensor) -> Work:
        return collective("reduce", whole[: len(share)], share)

    def gather_shares(self: World, share: torch.Tensor, whole: torch.Tensor) -> None:
        if share.is_cuda:
            collective("gather", share, whole[: len(share)])
        else:  # from the eager update that stands in for the kernels
            whole.zero_()[: len(share)].copy_(share)

    def collect(self: World, share: torch.Tensor, whole: torch.Tensor | None) -> None:
        assert whole is not None
        whole.zero_()[: len(share)].copy_(share)

    monkeypatch.setattr(World, "sum_to_shares", sum_to_shares)
    monkeypatch.setattr(World, "gather_shares", gather_shares)
    monkeypatch.setattr(World, "collect", collect)
    world, recipe = World(0, 2, 0, torch.device("cuda", 0)), replace(SMALL, precision="bf16", batch=32)
    flat, graph = (engine_of(replace(recipe, engine=name), accumulation, world) for name in ("flat", "graph"))
    source = batches(recipe, recipe.batch // 2 // accumulation, world, FIRST_REPLAY + 2)
    micro = list(source)
    for engine in (flat, graph):
        calls.clear()
        taken = iter(micro)
        for step in range(FIRST_REPLAY + 2):
            engine(taken, step, 1e-3)
    of_steps = list(calls)  # reading the state makes collectives of its own
    assert_same_state(flat, graph, 0, 0)
    assert isinstance(graph, FlatEngine)
    assert graph._stream is not None
    assert graph.reduction is not None
    parts = graph.flat.shards.buckets
    assert parts > 1
    assert graph._graph.recorder.counts["reduce"] == parts
    assert graph._graph.recorder.counts["gather"] == 1 + parts  # sums of squares, weights
    assert {stream for _, stream, _ in of_steps} == {graph._stream.stream_id}
    a_step = ["reduce"] * parts + ["wait"] * parts + ["gather"] * (1 + parts)
    assert [what for what, *_ in of_steps] == a_step * (FIRST_REPLAY + 1)
    assert {thread for what, _, thread in of_steps if what == "reduce"} - {main}, "none began in autograd's thread"


@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense waits"),
        (lambda x: torch.ones(3).to(x.device), "unless the CPU tensor is pinned"),
        (lambda x: x[x > 0], "nonzero waits|with a mask"),
        (lambda x: torch.cuda.synchronize(), "cudaDeviceSynchronize"),
        (lambda x: x.cpu(), "unless the CPU tensor is pinned"),
    ],
)
def test_a_capture_refuses_what_cuda_refuses(forbidden: Callable[[torch.Tensor], object], message: str) -> None:
    x = torch.ones(4, device="cuda")
    with pytest.raises(capture.CaptureError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
