"""What runs before anything is measured: a failure is told where it can be read afterwards, and the choice exists."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import verify
from benchmarks.measuring.harness import load
from benchmarks.measuring.record import ROOT, Recorder
from deitfast.verification.verdict import SLOWER, OpVerdict, Verdict

PLANTED = """
import pytest
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "off by one"
@pytest.fixture
def broken(): raise OSError("no such file")
def test_not_even_set_up(broken): pass
@pytest.mark.skip(reason="today")
def test_skipped(): pass
"""


def test_failures_are_rows_with_their_reasons(tmp_path: Path) -> None:
    planted, out = tmp_path / "test_planted.py", tmp_path / "rows.json"
    planted.write_text(PLANTED)
    command = [sys.executable, "-m", "benchmarks.verify", "--device", "cpu", "--out", str(out), str(planted)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
    rows = load(out)["rows"]
    (counts,) = [row["counts"] for row in rows if "counts" in row]
    assert counts == {"passed": 1, "failed": 2, "skipped": 1}
    failed = {row["key"]["test"].split("::")[1]: row["failed"] for row in rows if "failed" in row}
    assert failed.keys() == {"test_wrong", "test_not_even_set_up"}
    assert "off by one" in failed["test_wrong"]
    assert "no such file" in failed["test_not_even_set_up"]


@pytest.mark.parametrize(("status", "expected"), [("OK", 0), ("NO_TESTS_COLLECTED", 1), ("INTERNAL_ERROR", 1)])
def test_only_tests_that_ran_and_passed_verify_anything(status, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest, "main", lambda *_, **__: pytest.ExitCode[status])
    monkeypatch.chdir(ROOT)
    assert verify.main(["--device", "cpu"]) == expected


def chosen(**options: object) -> list[str]:
    return verify.selection(argparse.Namespace(**{"device": "cuda", "all": False, "tests": []} | options))


@pytest.mark.slow
def test_the_telling_tests_are_of_every_op_of_the_step_and_of_inference() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=-q", *chosen()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    ops = ("attention", "linear_ops", "layernorm_attention", "subset", "patch_embed", "input", "loss", "fused_block")
    files = {f"tests/kernels/test_{op}.py" for op in ops} | {"tests/test_step.py", "tests/test_inference.py"}
    assert files <= found


def test_all_tests_are_spread_over_processes_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.os, "sched_getaffinity", lambda _: set(range(16)))
    assert chosen(all=True) == ["-m", "gpu", "-n", "8", "--dist", "loadfile", "tests"]
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda _: None)
    assert chosen(all=True) == ["-m", "gpu", "tests"]


def test_a_row_takes_the_place_of_the_one_that_has_its_key(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rows.json", "theme", "cpu")
    for row in ({"key": {"op": "a"}, "n": 1}, {"key": {"op": "b"}}, {"key": {"op": "a"}, "n": 2}):
        recorder.replace(row)
    assert load(tmp_path / "rows.json")["rows"] == [{"key": {"op": "a"}, "n": 2}, {"key": {"op": "b"}}]


def test_the_packages_own_verdict_comes_first_and_a_wrong_op_is_a_failed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Verdict([OpVerdict("a", ms={"ours": 1.0}), OpVerdict("b", "eager", "it raises: X")])
    monkeypatch.setattr(verify, "verify", lambda *_: found)
    recorder = Recorder(tmp_path / "rows.json", "verify", "cpu")
    assert not verify.of_the_package(recorder, "telling")
    right, wrong = load(tmp_path / "rows.json")["rows"]
    assert (right["key"]["test"], right["forms"]) == ("verification of a", {"ours": 1.0})
    assert wrong["failed"] == "it raises: X"
    found.ops[1] = OpVerdict("b", "eager", f"{SLOWER}: 2 ms")
    assert verify.of_the_package(recorder, "telling")
    found.unverified = "its process ended"
    assert not verify.of_the_package(recorder, "telling")
