"""What a run printed, its files give again: `test` of best weights, checkpoint and averages; `predict`, too."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

import deitfast
from deitfast.cli.main import main
from deitfast.data.sources import PACKAGED
from deitfast.recipes.deit_digits import RECIPE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, deitfast.Result]:
    """A moment of training at a crop that is not the model's own."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    recipe = replace(
        RECIPE, out=str(out), epochs=2, eval_crop_ratio=0.8, warmup_epochs=0.5, ema_decay=0.9, eval_every=2, workers=1,
        mixup=0.0, erase=0.0, image_size=8,
    )  # fmt: skip
    return out, deitfast.train(recipe)


def scores_of(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    main(["test", "--data", "digits", "--json", "--device", "cpu", "--workers", "1", *map(str, words)])
    return json.loads(capsys.readouterr().out)


def test_the_files_of_a_run_have_the_accuracy_that_it_printed(
    trained: tuple[Path, deitfast.Result], capsys: pytest.CaptureFixture[str]
) -> None:
    out, result = trained
    assert result.ema is not None
    assert 20 < result.raw.top1 < 100  # something is learnt, and something is not
    printed = (out / "log.txt").read_text().splitlines()[-1]
    assert f"top-1 {result.raw.top1:.2f} % (ema {result.ema.top1:.2f} %)" in printed
    checkpoint = out / "ckpt" / (out / "ckpt/latest").read_text().strip()
    for expected, words in (
        (max(result.raw.top1, result.ema.top1), (out,)),
        (max(result.raw.top1, result.ema.top1), (out / "best/model.safetensors",)),
        (result.raw.top1, (checkpoint,)),
        (result.raw.top1, (checkpoint / "model.safetensors",)),
        (result.ema.top1, (checkpoint, "--ema")),
        (result.ema.top1, (out, "--ema")),
    ):
        facts = scores_of(capsys, "--weights", *words)
        assert facts["top1"] == expected, words
        assert facts["crop_ratio"] == 0.8
        assert facts["images"] == 360


@pytest.mark.parametrize("ema", [False, True])
def test_predict_counts_as_many_right_as_test(
    ema: bool, trained: tuple[Path, deitfast.Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = trained
    with tarfile.open(PACKAGED["digits"] / "val.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    words = ["--weights", str(out), *(["--ema"] if ema else [])]
    main(["predict", str(tmp_path), *words, "--csv", "--top", "1", "--device", "cpu"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 360
    right = sum(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert 100 * right / 360 == pytest.approx(scores_of(capsys, *words)["top1"], abs=1e-9)
