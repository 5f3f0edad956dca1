"""The benchmarks' instrument and their training step on the pretended device."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.measuring import harness, train_steps
from benchmarks.measuring.train_steps import Job, work


def test_the_instrument_measures_calls_laps_and_graphs() -> None:
    assert harness.measure(lambda: torch.zeros(8, device="cuda"), device="cuda", budget_ms=1).samples >= 3
    sets = [torch.zeros(8, device="cuda")] * 3
    graphed = harness.measure(lambda x: x + 1, device="cuda", sets=sets, budget_ms=1, graph=True)
    assert graphed.median_ms == pytest.approx(1 / 3)  # of an event's 1 ms for a lap over three
    assert harness.peak_bytes(lambda: torch.zeros(1000, device="cuda"), "cuda") == 4000
    assert harness.l2_bytes("cuda") == 50 << 20


@pytest.mark.parametrize(("engine", "fused"), [("graph", True), ("flat", True), ("", False)])
def test_a_training_step_is_timed(monkeypatch: pytest.MonkeyPatch, engine: str, fused: bool) -> None:
    monkeypatch.setattr(train_steps, "fastest_attention", lambda job: "math")
    job = Job(
        "ours", "deit_digits_patch4_16", 4, "cuda", precision="bf16", fused=fused, engine=engine, quick=True,
        launched=time.time(),
    )  # fmt: skip
    row = work(job, None)
    assert row["loss"] > 0
    assert row["memory_gib"] > 0
