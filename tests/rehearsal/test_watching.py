"""What is told about a run, of the pretended device: a profile of its steps, and an evaluation for its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

from deitfast.data import open_dataset
from deitfast.errors import DeitfastError
from deitfast.kernels import replaced, tunable
from deitfast.model.factory import LoadedModel, create_model
from deitfast.recipe import Recipe
from deitfast.training.profiling import profile
from deitfast.training.report import _evaluated
from deitfast.training.run_record import RunRecord
from tests.rehearsal.test_train import RECIPE


@pytest.mark.usefixtures("a_gpu_seen_for_the_first_time")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_few_steps_are_traced(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[ProfilerActivity]] = []
    real = torch.profiler.profile

    def only_the_cpu(activities: list[ProfilerActivity]) -> torch.profiler.profile:
        asked.append(set(activities))  # CUDA's events cannot be pretended: this build of PyTorch has none
        return real(activities=[ProfilerActivity.CPU])

    monkeypatch.setattr(torch.profiler, "profile", only_the_cpu)
    recipe = replace(RECIPE, device=device, engine="flat", decode="cpu", fused="no")
    with replaced.chosen(), tunable.picked({}):
        table = profile(recipe, tmp_path / "traced", steps=2)
    assert asked == [{ProfilerActivity.CPU} | ({ProfilerActivity.CUDA} if device == "cuda" else set())]
    assert "2 steps of" in table
    assert (tmp_path / "traced" / "trace.json").stat().st_size > 0


def record(recipe: Recipe, path: Path) -> RunRecord:
    return RunRecord(path, "run", recipe, {}, [], [], [], None, [])


def test_a_report_evaluates_on_either_device(tmp_path: Path) -> None:
    data = open_dataset("digits", quiet=True)
    torch.manual_seed(0)
    loaded = LoadedModel(create_model("deit_digits_patch4_16", num_classes=10), "x", data.classes)
    found = []
    for device, precision in (("cuda", "fp32"), ("cuda", "bf16"), ("cpu", "fp32")):
        scores, _ = _evaluated(record(replace(RECIPE, precision=precision), tmp_path), data, loaded, device)
        found.append(scores)
    assert {scores.images for scores in found} == {360}
    assert found[0].loss == pytest.approx(found[2].loss, rel=1e-2)  # another resize
    with pytest.raises(DeitfastError, match="no validation images"):
        _evaluated(record(RECIPE, tmp_path), replace(data, val=None), loaded, "cpu")
