"""What becomes of verdicts: kept, adopted, told; and of processes that an op or a machine ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.errors import DeitfastError
from deitfast.kernels import replaced
from deitfast.kernels.catalogue import Shape
from deitfast.kernels.replaced import EAGER, OURS
from deitfast.verification import process, verdict
from deitfast.verification.process import ProcessEnded, answers
from deitfast.verification.verdict import OpVerdict, Verdict, remembered
from deitfast.verification.verify import Question, adopt, ask, told

QUESTION = Question(("a", "b", "c"), Shape(width=64, heads=1, tokens=17, batch=8), "float32")
ENDINGS = "tests.verification.endings"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_op_runs_its_kernels() -> Iterator[None]:
    with replaced.chosen():
        yield


# Processes -----------------------------------------------------------------------------------------------------------


def test_a_process_answers_and_what_libraries_print_is_no_answer() -> None:
    assert list(answers(ENDINGS, {"end": "well"})) == [{"answer": "well"}]


@pytest.mark.parametrize(
    ("end", "why", "answered"),
    [
        ("at once", "exit status 1: no CUDA-capable device is detected", []),
        ("killed", "signal 6", [{"answer": "killed"}]),
    ],
)
def test_a_process_that_ends_says_how(end: str, why: str, answered: list[dict[str, str]]) -> None:
    found = answers(ENDINGS, {"end": end})
    assert [next(found) for _ in answered] == answered
    with pytest.raises(ProcessEnded, match=why):
        next(found)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(ENDINGS, {"end": "hangs"})
    assert next(found) == {"answer": "hangs"}
    monkeypatch.setattr(process, "PATIENCE_S", 0.1)
    with pytest.raises(ProcessEnded, match="no answer in 0 s"):
        next(found)


def scripted(monkeypatch: pytest.MonkeyPatch, ends: dict[str, str]) -> list[list[str]]:
    """Processes in which the ops of `ends` end the process; what each was asked."""
    asked: list[list[str]] = []

    def answers(module: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ops = job["question"]["ops"]
        asked.append(list(ops))
        for op in ops:
            yield {"begins": op}
            if op in ends:
                raise ProcessEnded(ends[op])
            yield asdict(OpVerdict(op))

    monkeypatch.setattr(process, "answers", answers)
    return asked


def test_an_op_that_ends_its_process_is_replaced_and_the_others_are_asked_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = scripted(monkeypatch, {"b": "its process ended with signal 11"})
    found = ask(QUESTION, CPU, print, known={})
    assert asked == [["a", "b", "c"], ["c"]]
    assert found.forms == {"a": OURS, "b": EAGER, "c": OURS}
    assert found.ops[1].why == "its process ended with signal 11"


def test_a_machine_on_which_no_process_begins_is_unverified_and_keeps_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(module: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        raise ProcessEnded("its process ended with exit status 1: exclusive mode")
        yield {}

    monkeypatch.setattr(process, "answers", answers)
    found = ask(QUESTION, CPU, print, known={})
    adopt(found)
    assert not replaced.CHOSEN
    assert [line for line in told(found) if "exclusive mode" in line] == told(found)


# What is kept --------------------------------------------------------------------------------------------------------


def test_a_finding_is_looked_up_until_what_it_depends_on_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path))
    found: list[str] = []

    def ask_about(driver: str) -> Any:
        def find() -> dict[str, Any]:
            found.append(driver)
            return {"about": driver}

        return remembered({"driver": driver}, find, keeps=lambda _: True)

    assert [ask_about(driver)["about"] for driver in ("1", "1", "2", "1")] == ["1", "1", "2", "1"]
    assert found == ["1", "2"]
    for path in (tmp_path / "verified").iterdir():
        path.write_text("{")
    assert ask_about("1") == {"about": "1"}
    assert found == ["1", "2", "1"]


def test_what_was_not_found_out_is_not_kept_and_a_cache_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path))
    assert remembered({"a": 1}, lambda: {"x": 1}, keeps=lambda _: False) == {"x": 1}
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path / "file"))
    assert remembered({"a": 1}, lambda: {"x": 1}, keeps=lambda _: True) == {"x": 1}


def test_a_verdict_survives_json() -> None:
    found = Verdict([OpVerdict("a", EAGER, "it raises", {"ours": 1.0}, 5)], "why")
    assert Verdict.of(json.loads(json.dumps(found.record()))) == found


def test_the_drivers_version_is_read_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23\nGCC version: gcc 12.2.0\n"
    monkeypatch.setattr(verdict.Path, "read_text", lambda _: text)
    assert verdict.driver() == "580.95.05"
    monkeypatch.undo()
    assert isinstance(verdict.driver(), str)


# What is done with it ------------------------------------------------------------------------------------------------


def test_a_wrong_op_is_told_in_one_line_with_how_to_report_it_and_a_slower_one_without() -> None:
    found = Verdict([OpVerdict("a"), OpVerdict("b", EAGER, "it raises: X"), OpVerdict("c", EAGER, "slower here: 2 ms")])
    wrong, slower = told(found)
    assert wrong.startswith("b runs as eager PyTorch: its kernels are wrong on this GPU: it raises: X. Please report")
    assert slower == "c runs as eager PyTorch: its kernels are slower here: 2 ms"
    adopt(found)
    assert replaced.CHOSEN == {"b": EAGER, "c": EAGER}


def test_who_insists_on_the_kernels_gets_an_error_and_no_replacement() -> None:
    found = Verdict([OpVerdict("b", EAGER, "it raises: X")])
    with pytest.raises(DeitfastError, match=r"b runs as eager .* --fused yes asks for the kernels"):
        adopt(found, insist=True)
    assert not replaced.CHOSEN
    adopt(replace(found, ops=[OpVerdict("b")]), insist=True)
