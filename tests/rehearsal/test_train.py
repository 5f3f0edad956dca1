"""Whole runs on the pretended device: resumed, interrupted, short of memory, ended; the smoke test."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast import guard
from deitfast.data import decoder
from deitfast.distributed import TRAINING_PATIENCE, start
from deitfast.engine.engine import UNCAPTURED_STEPS, FlatEngine
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe
from deitfast.training import first_contact
from deitfast.training.train import smoke, train
from deitfast.verification.verdict import Verdict
from tests.rehearsal import capture
from tests.test_train import losses

RECIPE = Recipe(
    model="deit_digits_patch4_16", data="digits", batch=32, mix_group=16, workers=1, epochs=1, warmup_epochs=0.0,
    drop_path=0.2, decode="gpu", ema_decay=0.9, device="cuda", log_every=1,
)  # fmt: skip


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """The graphs that steps are captured in."""
    made: list[weakref.ref[Any]] = []
    original = FlatEngine._capture

    def noted(self: FlatEngine, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(weakref.ref(self._graph))

    monkeypatch.setattr(FlatEngine, "_capture", noted)
    return made


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op is verified and no capture tried before a run."""
    monkeypatch.setattr(first_contact, "verify", lambda *_: Verdict())
    monkeypatch.setattr(first_contact, "capture_problem", lambda *_: "")


def test_a_run_follows_the_cpus_and_a_resumed_one_repeats_it_bit_for_bit(tmp_path: Path) -> None:
    whole, parts, cpu = (tmp_path / name for name in ("whole", "parts", "cpu"))
    result = train(replace(RECIPE, out=str(whole)), stop_at=10, eval_images=64, depth=2)
    train(replace(RECIPE, out=str(parts)), stop_at=6, depth=2)
    train(replace(RECIPE, out=str(parts)), stop_at=10, depth=2)
    assert losses(whole) == losses(parts)
    exact = train(replace(RECIPE, out=str(cpu), device="cpu", decode="auto"), stop_at=10, eval_images=64, depth=2)
    assert losses(whole) == pytest.approx(losses(cpu), abs=0.1)  # bf16, and another resize
    assert result is not None
    assert exact is not None
    assert result.raw.images == exact.raw.images == 64
    facts = json.loads((whole / "env.json").read_text())
    assert facts["gpu"]["name"] == "Pretended H100"
    assert "mem 0/80G" in (whole / "log.txt").read_text()


@pytest.mark.usefixtures("trusted")
def test_the_smoke_test_captures_and_replays_before_and_after_its_resume(
    graphs: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[int] = []
    monkeypatch.setattr(capture.CUDAGraph, "reset", lambda self: replays.append(self.replays))
    smoke(replace(RECIPE, log_every=0))
    assert len(graphs) == 2
    assert len(replays) == 2
    assert min(replays) >= 1
    assert "smoke test passed" in capsys.readouterr().out


def test_the_smoke_test_of_a_cpu_stays_small(capsys: pytest.CaptureFixture[str]) -> None:
    smoke(replace(RECIPE, device="cpu", decode="auto"))
    assert "smoke test passed: deit_digits_patch4_16 cut to 2 blocks on digits" in capsys.readouterr().out


@pytest.mark.parametrize(("device", "lines"), [("cuda", 1), ("cpu", 2)])
def test_without_a_wish_a_gpu_is_read_every_fifty_steps(tmp_path: Path, device: str, lines: int) -> None:
    train(replace(RECIPE, out=str(tmp_path), device=device, decode="auto", log_every=0), stop_at=2, depth=2)
    assert len(losses(tmp_path)) == lines


@pytest.mark.usefixtures("trusted")
def test_what_was_measured_when_a_run_began_stays_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = {"gpu": 1.0, "cpu": 2.0}
    monkeypatch.setattr(decoder, "_images_per_second", lambda *arguments: speed[arguments[3]])
    recipe = replace(RECIPE, out=str(tmp_path), decode="auto")
    run_module = "deitfast.training.run.largest_micro_batch"
    choices = []
    for speed["gpu"], largest, changes in ((1.0, 16, False), (3.0, 32, False), (3.0, 8, False), (3.0, 32, True)):
        monkeypatch.setattr(run_module, lambda *_, largest=largest: largest)
        train(replace(recipe, allow_changes=changes), stop_at=1, depth=2)
        choices.append(json.loads((tmp_path / "env.json").read_text())["choices"])
    assert [choice["decode"] for choice in choices] == ["cpu", "cpu", "cpu", "gpu"]
    # What no longer fits is chosen anew.
    assert [choice["micro_batch"] for choice in choices] == [16, 16, 8, 32]
    facts = json.loads((tmp_path / "env.json").read_text())
    facts["choices"] |= {"processes": 8, "micro_batch": 4, "decode": "cpu"}
    (tmp_path / "env.json").write_text(json.dumps(facts))
    train(recipe, stop_at=1, depth=2)
    facts = json.loads((tmp_path / "env.json").read_text())["choices"]
    assert facts | {"device": "cuda", "processes": 1, "micro_batch": 32, "decode": "cpu"} == facts


def test_no_tensor_leaves_dali_by_dlpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When such a tensor dies a thread of DALI's synchronises the device, which breaks a capture under way."""
    monkeypatch.setattr(torch, "from_dlpack", lambda *_: pytest.fail("a tensor came by DLPack"))
    train(replace(RECIPE, out=str(tmp_path)), stop_at=UNCAPTURED_STEPS + 1, depth=2)


def test_threads_that_use_the_gpu_meanwhile_do_not_break_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, rounds = threading.Event(), threading.Semaphore(0)
    problems: list[BaseException] = []

    def use() -> None:
        try:
            while not ended.is_set():
                torch.ones(2, device="cuda").sum().item()
                torch.cuda.current_stream().synchronize()
                rounds.release()
                time.sleep(0.001)
        except BaseException as error:
            problems.append(error)
            rounds.release(3)

    run, met = FlatEngine.run, []

    def meeting(self: FlatEngine, *arguments: Any) -> None:
        if capture.ACTIVE:  # a whole round of the thread lies inside the capture
            while rounds.acquire(blocking=False):
                pass
            met.append(rounds.acquire() and rounds.acquire())
        run(self, *arguments)

    monkeypatch.setattr(FlatEngine, "run", meeting)
    thread = threading.Thread(target=use)
    thread.start()
    try:
        train(replace(RECIPE, out=str(tmp_path)), stop_at=UNCAPTURED_STEPS + 2, depth=2)
    finally:
        ended.set()
        thread.join()
    assert met == [True]
    assert not problems


def _die() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(
    ("event", "code"),
    [(None, 0), (lambda: os.kill(os.getpid(), signal.SIGTERM), 75), (_die, 1)],
    ids=["end", "SIGTERM", "error"],
)
def test_no_graph_is_alive_when_the_process_group_is_destroyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[Any], event: Callable[[], None] | None, code: int
) -> None:
    """NCCL waits for a graph that holds its collectives."""
    alive: list[bool] = []
    call, count = FlatEngine.__call__, iter(range(100))

    def step(self: FlatEngine, *arguments: Any) -> None:
        if event and next(count) == UNCAPTURED_STEPS + 2:
            event()
        call(self, *arguments)

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(FlatEngine, "__call__", step)
    monkeypatch.setattr(guard, "_started", lambda: True)
    monkeypatch.setattr(guard.os, "_exit", leave)
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group",
        lambda: alive.append(any(graph() is not None and graph().recorder is not None for graph in graphs)),
    )  # fmt: skip
    recipe = replace(RECIPE, out=str(tmp_path))

    def main() -> None:
        train(recipe, stop_at=UNCAPTURED_STEPS + 4, depth=2)

    if code:
        with pytest.raises(SystemExit) as left:
            guard.guarded(main)
        assert left.value.code == code
    else:
        guard.guarded(main)
    assert len(graphs) == 1
    assert alive == [False]


@pytest.mark.parametrize("when", ["in the first step", "in the capture"])
def test_lack_of_memory_is_told_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    run = FlatEngine.run

    def failing(self: FlatEngine, *arguments: Any) -> None:
        if when == "in the first step" or capture.ACTIVE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, *arguments)

    monkeypatch.setattr(FlatEngine, "run", failing)
    with pytest.raises(DeitfastError, match=r"out of memory at micro-batch 32 .* Try --micro-batch 16, or --recompute"):
        train(replace(RECIPE, out=str(tmp_path)), stop_at=UNCAPTURED_STEPS + 1, depth=2)


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """As local rank 1 of 2; the arguments that the process group is made with."""
    made: list[dict[str, Any]] = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: made.append({"backend": backend, **options})
    )
    yield made
    torch.cuda.set_device(0)


def test_processes_join_by_nccl_on_a_gpu_each(torchrun: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    world = start("auto")
    assert world.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 1
    assert torchrun[0]["backend"] == "nccl"
    assert torchrun[0]["device_id"] == torch.device("cuda", 1)
    assert torchrun[0]["timeout"] == TRAINING_PATIENCE
    assert start("cpu").device.type == "cpu"
    assert torchrun[1]["backend"] == "gloo"
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(DeitfastError, match="has no GPU: this machine has 4"):
        start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert start("auto").device.type == "cpu"
