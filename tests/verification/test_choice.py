"""The fastest of an op's forms and entries that are right; one that is wrong, fails or ends its process is not run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deitfast.kernels import replaced
from deitfast.kernels.catalogue import Draw, Op, Shape, Tensors
from deitfast.kernels.common import Launch
from deitfast.kernels.replaced import EAGER, OURS, replaceable
from deitfast.kernels.tunable import PICKED, Pick, described, picked, recorded, tunable
from deitfast.verification import choice, process
from deitfast.verification.case import Case, Expected
from deitfast.verification.check import _attempt
from deitfast.verification.choice import Offers, fastest_form
from deitfast.verification.process import ProcessEnded
from deitfast.verification.verdict import OTHER_ENTRIES, OpVerdict, Verdict
from deitfast.verification.verify import Question, adopt, ask, told

OWN, FAST, WRONG, FAILS, SEARCHED = (Launch({"BLOCK": block}, 4, 2) for block in (1, 2, 3, 4, 5))
SELECTION = "chosen_launch width=4"
SHAPE = Shape(width=4, heads=1, tokens=3, batch=2)


@tunable(lambda arch, width: [FAST, WRONG, FAILS], lambda arch, width: [FAST, SEARCHED])
def chosen_launch(arch: int, width: int) -> Launch:
    return OWN


def reference(x: Tensor) -> Tensor:
    return x * 2


@replaceable(reference)
def doubled(x: Tensor) -> Tensor:
    entry = chosen_launch(90, 4)
    if entry == FAILS:
        raise RuntimeError("out of resources: shared memory")
    return x * (3 if entry == WRONG else 2)


OP = Op("doubled", doubled, reference, lambda draw, s: {"x": draw.normal(*s.leading, s.width)})


def verdict(monkeypatch: pytest.MonkeyPatch, ms: Callable[[str], float], **offers: Any) -> tuple[OpVerdict, set[str]]:
    """And all ways that were timed."""
    timed: set[str] = set()

    def milliseconds(calls: dict[str, Callable[[], Tensors]], device: torch.device) -> dict[str, list[float]]:
        timed.update(calls)
        for call in calls.values():
            call()
        return {way: [ms(way), ms(way) + 0.01] for way in calls}

    monkeypatch.setattr(choice, "milliseconds", milliseconds)
    monkeypatch.setattr(choice.warm, "compile_all", lambda *_: iter(()))
    case = Case.draw(OP, SHAPE, Draw(0, torch.float32), backward=True)
    expected = Expected(case.exact(), case.run(reference))
    return fastest_form(case, expected, _attempt, Offers(**offers), 3), timed


def by(**ms: float) -> Callable[[str], float]:
    names = {"fast": described(FAST), "searched": described(SEARCHED), "other": OTHER_ENTRIES, "eager": EAGER}
    return lambda way: next((value for name, value in ms.items() if names[name] == way), 1.0)


def test_an_entry_that_is_faster_runs_and_what_is_wrong_or_fails_is_not_even_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, timed = verdict(monkeypatch, by(fast=0.5, other=0.5))
    assert (found.form, found.why) == (OURS, "")
    assert found.launches == {SELECTION: recorded(FAST)}
    assert found.faster == {SELECTION: described(FAST)}
    assert timed == {described(OWN), described(FAST), OURS, OTHER_ENTRIES, EAGER}
    assert found.tried == {SELECTION: {described(OWN): 1.005, described(FAST): 0.505}}
    [line] = told(Verdict([found]))
    assert line.endswith(f"0.505 instead of 1.005 ms: {SELECTION}: {described(FAST)}")
    with replaced.chosen(), picked({}):
        adopt(found := Verdict.of({"ops": [asdict(found)], "unverified": ""}), insist=True)
        assert PICKED == {SELECTION: FAST}
        assert not replaced.CHOSEN


@pytest.mark.parametrize(
    ("ms", "form", "entry"),
    [
        ({}, OURS, OWN),
        ({"fast": 0.995}, OURS, OWN),
        ({"fast": 0.5}, OURS, OWN),
        ({"fast": 0.5, "other": 0.5, "eager": 0.4}, EAGER, None),
        ({"fast": 0.5, "other": 0.5, "eager": 0.6}, OURS, FAST),
    ],
    ids=["a tie", "within noise", "not together", "eager beats it", "it beats eager"],
)
def test_ties_are_the_tables_and_nothing_runs_where_something_else_is_faster(
    ms: dict[str, float], form: str, entry: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = verdict(monkeypatch, by(**ms))
    assert found.form == form
    assert found.launches == ({} if entry is None else {SELECTION: recorded(entry)})
    assert bool(found.faster) == (entry == FAST)


def test_a_search_tries_everything_and_a_later_run_tries_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ms = by(searched=0.5, other=0.5)
    assert verdict(monkeypatch, ms)[0].launches == {SELECTION: recorded(OWN)}
    assert verdict(monkeypatch, ms, searched=True)[0].launches == {SELECTION: recorded(SEARCHED)}
    assert verdict(monkeypatch, ms, known={SELECTION: SEARCHED})[0].launches == {SELECTION: recorded(SEARCHED)}
    late, timed = verdict(monkeypatch, ms, searched=True, deadline=0.0)
    assert described(SEARCHED) not in timed
    assert late.launches == {SELECTION: recorded(OWN)}


def test_what_one_op_decided_the_next_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    found, timed = verdict(monkeypatch, by(fast=0.5, other=0.5), settled={SELECTION: SEARCHED})
    assert found.launches == {SELECTION: recorded(SEARCHED)}
    assert not found.faster
    assert described(FAST) not in timed


def test_an_entry_that_ends_its_process_is_left_out_and_its_op_keeps_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[dict[str, Any]] = []

    def answers(module: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        jobs.append(job)
        for op in job["question"]["ops"]:
            yield {"begins": op}
            yield {"tries": "the first entry"}
            yield {"tries": ""}
            if "the last entry" not in job["barred"]:
                yield {"tries": "the last entry"}
                raise ProcessEnded("its process ended with signal 11")
            yield {"says": f"{op} is done"}
            yield asdict(OpVerdict(op, launches={SELECTION: recorded(OWN)} if op == "a" else {}))

    monkeypatch.setattr(process, "answers", answers)
    said: list[str] = []
    question = Question(("a", "b"), Shape(width=64, heads=1, tokens=17, batch=8), "float32")
    found = ask(question, torch.device("cpu"), said.append, known={})
    assert found.forms == {"a": OURS, "b": OURS}
    assert [job["barred"] for job in jobs] == [[], ["the last entry"]]
    assert said == ["a is done", "b is done"]
    assert found.launches == {SELECTION: OWN}
    assert replace(OpVerdict("a"), launches=found.ops[0].launches) == found.ops[0]
