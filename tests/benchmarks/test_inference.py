"""The inference benchmark: it runs, it compares the same function, and it refuses to time a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_inference
from benchmarks.measuring.peers_models import build, reference_state
from deitfast.data import normalise

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


def test_what_is_compiled_takes_the_bytes_and_small_batches_get_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = {}

    def compiled(net, *, mode, dynamic):
        modes[mode] = dynamic
        return net

    monkeypatch.setattr(torch, "compile", compiled)
    images = bench_inference.images_of(MODEL, 3, "cpu")
    eager, _ = bench_inference.make("ours, not fused", MODEL, "cpu", torch.float32)
    for way in (bench_inference.REDUCE_OVERHEAD, "timm + compile"):
        call, how = bench_inference.make(way, MODEL, "cpu", torch.float32)
        torch.testing.assert_close(call(images), eager(images), rtol=1e-4, atol=1e-4)
        assert "torch.compile" in how
    assert modes == {"reduce-overhead": False, "default": False}
    model = build("ours", MODEL, reference_state(MODEL)).eval()
    torch.testing.assert_close(eager(images), model(normalise(images)), rtol=1e-5, atol=1e-5)
