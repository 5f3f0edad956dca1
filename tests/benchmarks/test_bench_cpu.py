"""The CPU's comparison: the least of the calls that count, and ours against the best of the others."""

from __future__ import annotations

import pytest

from benchmarks import bench_cpu


def test_the_first_call_does_not_count_and_the_least_of_the_others_does(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"cpu": 0.0, "wall": 0.0}
    monkeypatch.setattr(bench_cpu.time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(bench_cpu.time, "perf_counter", lambda: now["wall"])
    taken = iter([0.5, 3.0, 2.0, 4.0])

    def call() -> None:
        cpu = next(taken)
        now["cpu"] += cpu
        now["wall"] += 3 * cpu

    assert bench_cpu.least({"ours": call}, rounds=3) == {"ours": (2.0, 6.0)}


def test_ours_is_held_against_the_best_of_the_others() -> None:
    found = {"ours": (1.0, 2.0), "timm": (1.5, 2.0), "huggingface": (1.2, 9.0)}
    ours, timm, _ = bench_cpu.rows_of("training", "m", 4, found)
    assert ours["times_best_peer"] == pytest.approx(1.2)
    assert (timm["cpu_ms_image"], timm["ms_image"]) == (375.0, 500.0)


def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_cpu.main(["--model", "deit_tny"]) == 2
    assert capsys.readouterr().err.startswith("bench_cpu: model 'deit_tny' unknown.")
