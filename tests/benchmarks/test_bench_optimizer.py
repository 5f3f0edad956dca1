"""The optimiser benchmark, rehearsed on CPU; a planted wrong update gets no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_optimizer
from benchmarks.measuring.harness import load

QUICK = ["--device", "cpu", "--quick"]


@pytest.mark.usefixtures("timm")
def test_the_quick_path_times_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    assert bench_optimizer.main([*QUICK, "--out", str(out)]) == 0
    data = load(out)
    timed = [(row["key"]["op"], row["key"]["way"]) for row in data["rows"] if row["ms"] > 0]
    assert timed == [(op, way) for op, ways in bench_optimizer.WAYS.items() for way in ways]
    assert data["finished"]
    assert "adamw  small  flat" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"beta1": 0.91}, {"weight_decay": 0.06}, {"ema_decay": 0.91}, {"clip_norm": 0.0}])
def test_a_wrong_update_gets_no_number(
    wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat_way = bench_optimizer.flat_way

    def wrong_way(model, settings, grads):
        return flat_way(model, type(settings)(**{**vars(settings), **wrong}), grads)

    monkeypatch.setattr(bench_optimizer, "flat_way", wrong_way)
    assert bench_optimizer.main([*QUICK, "--only", "adamw"]) == 1
    assert "REFUSED adamw" in capsys.readouterr().err
