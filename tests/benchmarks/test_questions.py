"""The questions, rehearsed on CPU: each has an answer or says why there is none, and a wrong launch gets no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import questions
from benchmarks.measuring.command import Finished
from benchmarks.measuring.harness import Refused, load
from deitfast.kernels.common import INTERPRETED

QUICK = ["--device", "cpu", "--quick"]
needs_launches = pytest.mark.skipif(INTERPRETED, reason="the interpreter has launches of its own")


@needs_launches
def test_every_question_is_answered_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    out = tmp_path / "rows.json"
    assert questions.main([*QUICK, "--out", str(out)]) == 0
    rows = load(out)["rows"]
    asked = {row["key"]["question"] for row in rows}
    assert asked == {*questions.QUESTIONS, "attention bwd_short", "attention fwd_short"} - {"attention"}
    for row in rows:
        assert row.get("answer") or row["skipped"] == "needs a GPU", row
    tiles = [row["key"]["way"] for row in rows if row["key"]["question"] == "fc1 tile"]
    assert {"BLOCK_N=128 ", "BLOCK_N=256 "} <= {word + " " for way in tiles for word in way.split()}
    assert sum("stages=" in row["key"].get("way", "") for row in rows) == len(tiles) + 3 + 3
    decoded = [row["answer"] for row in rows if row["key"].get("way", "").startswith("cpu, ")]
    assert len(decoded) == len(questions.KINDS)
    assert all(answer.startswith("largest difference ") for answer in decoded)


@needs_launches
def test_a_wrong_launch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(questions.Trial):
        def check(self, candidate):
            if candidate.num_stages == 3:
                raise Refused("largest error")

    monkeypatch.setattr(questions, "Trial", Wrong)
    out = tmp_path / "rows.json"
    assert questions.main([*QUICK, "--only", "attention", "--out", str(out)]) == 1
    rows = load(out)["rows"]
    assert ["refused" in row for row in rows].count(True) == 2
    assert all("stages=3" in row["key"]["way"] for row in rows if "refused" in row)


@pytest.mark.parametrize(
    ("finished", "told"),
    [
        (Finished(0, 'noise\n{"answer": "held"}\n', "", 1.0), {"answer": "held"}),
        (Finished(1, "", "RuntimeError: broke\n", 1.0), {"failed": "exit status 1: RuntimeError: broke"}),
        (Finished(None, "", "", 60.0), {"failed": "took longer than 60 s"}),
    ],
)
def test_what_may_spoil_a_process_has_one_of_its_own(finished, told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "run_limited", lambda *_: finished)
    for question in questions.CHILDREN:
        (row,) = questions.ask_child(question, "cuda", quick=True)
        assert row == {"key": {"op": "question", "question": question}, **told}


def test_trouble_with_one_question_is_not_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_):
        raise ValueError("no such thing")
        yield

    monkeypatch.setitem(questions.QUESTIONS, "wgrad", broken)
    out = tmp_path / "rows.json"
    assert questions.main([*QUICK, "--only", "wgrad", "nccl", "--out", str(out)]) == 0
    assert [set(row) - {"key"} for row in load(out)["rows"]] == [{"failed"}, {"skipped"}]
