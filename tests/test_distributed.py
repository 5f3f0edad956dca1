"""What processes tell each other: by threads around one store, each in the place of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deitfast import distributed, guard
from deitfast.distributed import World
from deitfast.errors import DeitfastError
from deitfast.training.resume import check_same_step


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


def on_each(action: Callable[[World], Any], size: int = 3, machines: int = 1) -> list[Any]:
    """The result of `action`, or the exception that it raised, on each of `size` processes."""
    local = size // machines

    def run(rank: int) -> Any:
        try:
            return action(World(rank, size, rank % local, torch.device("cpu")))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_values_go_round_and_leave_nothing_in_the_store(store: dist.Store) -> None:
    def action(world: World) -> tuple[Any, ...]:
        return world.gather({"rank": world.rank}), world.share(world.rank + 7), world.gather(None)

    expected = ([{"rank": 0}, {"rank": 1}, {"rank": 2}], 7, [None] * 3)
    assert on_each(action) == [expected] * 3
    assert store.num_keys() == 3  # how often each has spoken


def test_one_process_of_each_machine_goes_first(store: dist.Store) -> None:
    order: list[int] = []
    lock = threading.Lock()

    def action(world: World) -> int:
        def work() -> int:
            time.sleep(0.02 * (world.local_rank == 0))
            with lock:
                order.append(world.rank)
            return world.rank

        return world.agree(work)

    assert on_each(action, size=4, machines=2) == [0, 1, 2, 3]
    assert set(order[:2]) == {0, 2}


def test_a_mistake_on_one_process_is_told_by_it_alone_and_stops_all(store: dist.Store) -> None:
    def action(world: World) -> None:
        def work() -> None:
            if world.rank == 1:
                raise DeitfastError("no such file")

        world.agree(work)

    found = on_each(action)
    assert [type(error) for error in found] == [DeitfastError] * 3
    assert [str(error) for error in found] == ["", "no such file", ""]


def test_any_other_error_comes_out_where_it_happened_and_stops_all(store: dist.Store) -> None:
    def action(world: World) -> None:
        world.agree(lambda: 1 // 0 if world.rank == 2 else None)

    found = on_each(action)
    assert [type(error) for error in found] == [DeitfastError, DeitfastError, ZeroDivisionError]
    assert [str(error) for error in found[:2]] == ["", ""]


def test_one_process_alone_meets_its_own_error() -> None:
    alone = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        alone.agree(lambda: 1 // 0)
    assert alone.gather(3) == [3]
    assert alone.share(3) == 3


def test_an_unknown_wire_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEITFAST_WIRE", "bf16")
    assert distributed.start("cpu").wire == torch.bfloat16
    monkeypatch.setenv("DEITFAST_WIRE", "fp8")
    with pytest.raises(DeitfastError, match="DEITFAST_WIRE is 'fp8', must be fp32 or bf16"):
        distributed.start("cpu")


def test_a_process_that_never_answers_is_named(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "SET_UP_PATIENCE", timedelta(seconds=0.05))
    found = on_each(lambda world: None if world.rank == 1 else world.gather(world.rank))
    assert "process 1 has not answered for 0:00:00.05" in str(found[0])


def test_processes_that_resumed_elsewhere_stop_in_one_line(store: dist.Store) -> None:
    def run(world: World, step: int, checkpoint: str = "") -> SimpleNamespace:
        return SimpleNamespace(world=world, step=step, resumed_from=checkpoint)

    found = on_each(lambda world: check_same_step(run(world, 500 * (world.rank < 2))))
    assert [str(error) for error in found[1:]] == ["", ""]
    assert str(found[0]) == (
        "process 0 would go on at step 500 and process 2 at step 0. Give an --out that all machines share"
    )
    assert on_each(lambda world: check_same_step(run(world, 3))) == [None] * 3
    found = on_each(lambda world: check_same_step(run(world, 3, "ab"[world.rank > 0])))
    assert str(found[0]).startswith("process 0 would go on at step 3 and process 1 at step 3, of another run. Give")


def test_a_mistake_that_one_process_made_ends_it_before_anybody_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    happened: list[object] = []

    def leave(code: int) -> None:
        happened.append(code)
        raise SystemExit(code)

    def mistake() -> None:
        raise DeitfastError("out of memory")

    monkeypatch.setattr(guard, "_started", lambda: True)
    monkeypatch.setattr(guard.os, "_exit", leave)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: happened.append("waits"))
    with pytest.raises(SystemExit):
        guard.guarded(mistake)
    assert happened[0] == 2
    assert capsys.readouterr().err == "error: out of memory\n"
