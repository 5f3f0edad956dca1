"""--track: TensorBoard's files read back beside metrics.jsonl; W&B and trackio by stand-ins that keep what they get."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deitfast.errors import DeitfastError
from deitfast.recipes.deit_digits import RECIPE
from deitfast.training.trackers import Trackers, chosen_trackers
from deitfast.training.train import train


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve that TensorBoard finds in a run folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


class Remembers:
    """What `init` of W&B's or trackio's package gives; breaks after so many lines."""

    def __init__(self, lasts: int = 10**9) -> None:
        self.lasts, self.logged, self.ended, self.axis = lasts, [], False, None  # type: ignore[var-annotated]

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if len(self.logged) == self.lasts:
            raise ConnectionError("the service is gone\nand says more")
        self.logged.append((values, step))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axis = name, step_metric

    def finish(self) -> None:
        self.ended = True


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, *runs: Remembers | Exception) -> list[dict[str, Any]]:
    """Puts a package in W&B's or trackio's place whose `init` gives one of `runs` a call; what it was called with."""
    module, asked, left = ModuleType(name), [], list(runs)

    def init(**options: Any) -> Remembers:
        asked.append(options)
        run = left.pop(0)
        if isinstance(run, Exception):
            raise run
        return run

    module.init, module.Settings = init, lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, module)
    return asked


def opened(folder: Path, *names: str, step: int = 0) -> tuple[Trackers, list[str], list[tuple[str, int, str]]]:
    said: list[str] = []
    faults: list[tuple[str, int, str]] = []
    trackers = Trackers(names, folder, {"lr": 1e-3}, step, say=said.append, fault=lambda *what: faults.append(what))
    return trackers, said, faults


def test_tensorboard_has_the_numbers_of_a_run_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    first, second = Remembers(lasts=2), Remembers()
    asked = stand_in("trackio", monkeypatch, first, second)
    small = replace(RECIPE, epochs=1, batch=96, warmup_epochs=0, workers=1, out=str(tmp_path))
    train(small, stop_at=3, quiet=True, track=("tensorboard", "trackio"))
    train(small, stop_at=5, eval_images=8, quiet=True, track=("tensorboard", "trackio"))
    lines, found = lines_of(tmp_path), read_back(tmp_path)
    steps = [line for line in lines if "lr" in line]
    for key in ("loss", "lr", "images_per_second", "data_wait", "epoch", "skipped"):
        assert found[f"train/{key}"] == [(s["step"], pytest.approx(s[key], rel=1e-6)) for s in steps], key
    (evaluated,) = (line for line in lines if "top1" in line)
    assert found["val/ema_top1"] == [(5, pytest.approx(evaluated["ema_top1"], rel=1e-6))]
    assert len(steps) == 5

    # trackio failed in the third step: told once, and the run went on; the resumed run goes on as the same one
    assert [step for _, step in first.logged] == [1, 2]
    assert [step for _, step in second.logged] == [4, 5, 5]
    assert second.ended
    assert asked[0]["name"] == asked[1]["name"]
    assert asked[1]["resume"] == "allow"
    assert asked[1]["config"]["model"] == RECIPE.model
    faults = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert [(f["kind"], f["step"]) for f in faults] == [("tracker", 3)]
    assert "ConnectionError: the service is gone. Training goes on" in (tmp_path / "log.txt").read_text()


def test_what_a_killed_start_sent_too_much_is_not_shown_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for begin, end in ((0, 8), (5, 10)):  # killed at 8, the newest checkpoint was of step 5
        trackers, said, _ = opened(tmp_path, "tensorboard", step=begin)
        for step in range(begin + 1, end + 1):
            trackers.send({"step": step, "loss": 1.0 / step + begin, "waits": [0.1, 0.2]})
        trackers.close()
    curve = read_back(tmp_path)["train/loss"]
    assert sorted(step for step, _ in curve) == list(range(1, 11))
    assert dict(curve)[8] == pytest.approx(5 + 1 / 8)
    assert not said


def test_wandb_goes_on_with_its_run_over_the_run_s_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Remembers(), Remembers()
    asked = stand_in("wandb", monkeypatch, first, second)
    for step in (0, 7):
        trackers, said, faults = opened(tmp_path, "wandb", step=step)
        trackers.send({"step": step + 1, "epoch": 0.5, "loss": float("nan"), "by_process": [1.0, 2.0], "note": "x"})
        trackers.send({"step": step + 1, "epoch": 1, "top1": 50.0})
        trackers.close()
        assert (said, faults) == ([], [])
    assert asked[0]["id"] == asked[1]["id"]
    assert asked[0]["resume"] == "allow"
    assert asked[0]["name"] == tmp_path.name
    assert first.axis == ("*", "step")
    assert [sorted(values) for values, _ in second.logged] == [
        ["step", "train/epoch", "train/loss"], ["step", "val/epoch", "val/top1"]
    ]  # fmt: skip
    assert second.logged[1][0]["step"] == 8
    assert second.ended


def test_a_tracker_that_does_not_start_ends_a_new_run_and_not_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, refused = Remembers(), RuntimeError("no API key\n(see the manual)")
    stand_in("trackio", monkeypatch, first, Remembers())
    stand_in("wandb", monkeypatch, refused, refused)
    with pytest.raises(DeitfastError, match=r"^--track wandb does not start: no API key. Mend that, or leave it out$"):
        opened(tmp_path, "trackio", "wandb")
    assert first.ended, "the one that was open already"
    trackers, said, faults = opened(tmp_path, "trackio", "wandb", step=4)
    assert [fault[:2] for fault in faults] == [("tracker", 4)]
    assert len(said) == 1
    trackers.send({"step": 5, "loss": 1.0})
    assert len(faults) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tensorbord", "--track tensorbord is unknown. Did you mean tensorboard?"),
        ("tensorboard,wandb", r"--track wandb needs the package wandb: pip install wandb, our extra \[wandb\]"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def present(name: str) -> Any:
        return None if name == "wandb" else object()

    monkeypatch.setattr("deitfast.training.trackers.find_spec", present)
    with pytest.raises(DeitfastError, match=told):
        chosen_trackers(text)
    assert chosen_trackers("") == ()
    assert chosen_trackers("trackio, tensorboard,trackio") == ("trackio", "tensorboard")
