"""The inference benchmark: it runs, it compares the same function, and it refuses to time a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_inference

MODEL = "deit_digits_patch4_16"


def test_every_way_is_timed_at_every_batch(tmp_path: Path, timm) -> None:
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--quick", "--models", MODEL, "--batches", "1", "3", "--out", str(out)]
    assert bench_inference.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["key"]["batch"], row["key"]["way"]) for row in rows] == [
        (batch, way) for batch in (1, 3) for way in ("ours", "timm", "huggingface")
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1e3 * row["key"]["batch"] / row["ms"])


def test_a_wrong_way_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench_inference.make

    def wrong(way, model, device, dtype):
        call, how = make(way, model, device, dtype)
        return (lambda images: call(images) + 0.1) if way == "ours" else call, how

    monkeypatch.setattr(bench_inference, "make", wrong)
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--quick", "--models", MODEL, "--batches", "2", "--ways", "ours"]
    assert bench_inference.main([*arguments, "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert "off by" in row["refused"]
    assert "ms" not in row
    assert bench_inference.main(["--device", "cpu", "--models", "deit_bas"]) == 2
