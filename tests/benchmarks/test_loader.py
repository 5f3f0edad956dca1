"""The loader benchmark counts images, and says what is absent."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_loader
from deitfast.data import open_dataset

CPU = bench_loader.PLACES["cpu"]


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits", "train", quiet=True).train.head(48)


@pytest.mark.parametrize("way", bench_loader.OURS)
def test_our_loaders_yield_whole_batches(way, digits):
    batches = bench_loader.OURS[way](digits, bench_loader.Setting(CPU, 12, 32, 1))
    assert list(itertools.islice(batches, 3)) == [12, 12, 12]
    batches.close()


def test_every_row_decodes_where_it_says(digits, monkeypatch, tmp_path):
    """The loader is told, so it does not choose; the rows of a GPU are those that lie on it."""
    told = []

    class Loader:
        def __init__(self, manifest, recipe, *_, device, **__):
            told.append((recipe.decode, device))

        def __enter__(self):
            return iter([SimpleNamespace(images=torch.zeros(6))] * 99)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(bench_loader, "TrainLoader", Loader)
    monkeypatch.setattr(bench_loader, "ready", lambda *_: True)
    monkeypatch.setattr(bench_loader, "synchronize", lambda _: None)
    monkeypatch.setattr(bench_loader, "dali_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "rows.json"
    ways = ["--ways", "augmented, decode once", "--batch", "6"]
    assert bench_loader.main(["--device", "cuda", "--quick", "--out", str(path), *ways]) == 0
    decodes = [row["key"]["decode"] for row in json.loads(path.read_text())["rows"]]
    assert decodes == ["cpu", "cpu, rest gpu", "gpu"]
    assert told == [("cpu", "cpu"), ("cpu", "cuda"), ("gpu", "cuda")]
    told.clear()
    assert bench_loader.main(["--device", "cpu", "--quick", *ways]) == 0
    assert told == [("cpu", "cpu")]


def test_images_of_all_runs_are_counted():
    runs, images, cpu_ms = bench_loader.time_loader(itertools.repeat(7), "cpu", 0.01, 2, 2)
    assert images == 7
    assert cpu_ms >= 0
    assert len(runs) == 2
    assert all(run.samples >= bench_loader.FEWEST and run.median_ms > 0 for run in runs)


def test_without_dali_ours_is_absent_and_the_rest_goes_on(digits, monkeypatch):
    monkeypatch.setattr(bench_loader, "dali_missing", lambda: "nvidia-dali is not installed")
    row = bench_loader.measure_way("decode", digits, bench_loader.Setting(CPU, 12, 32, 1), quick=True)
    assert row == {"absent": "nvidia-dali is not installed"}


def test_a_loader_that_fails_is_a_row(digits, monkeypatch):
    def broken(*_):
        yield 12
        raise ValueError("in a worker:\nbad bits")

    monkeypatch.setitem(bench_loader.TIMM, "timm (PIL)", broken)
    row = bench_loader.measure_way("timm (PIL)", digits, bench_loader.Setting(CPU, 12, 32, 1), quick=True)
    assert row == {"failed": "bad bits"}


def test_class_folders_without_splits_will_do(tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 30)).save(tmp_path / name / "x.jpg")
    assert len(bench_loader.open_images(str(tmp_path))) == 2


@pytest.mark.slow
def test_the_quick_run_measures_ours_beside_timm(tmp_path, capsys):
    path = tmp_path / "rows.json"
    ways = ["--ways", "augmented, decode once", "timm (PIL)"]
    assert bench_loader.main(["--device", "cpu", "--quick", "--threads", "1", "--out", str(path), *ways]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["key"]["way"] for row in rows] == ways[1:]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(row["images_per_cpu_second"] > 0 for row in rows)
    assert "a CPU second" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(capsys):
    assert bench_loader.main(["--device", "cpu", "--batch", "7"]) == 2
    assert "--batch 7 must be a multiple of 6" in capsys.readouterr().err
    assert bench_loader.main(["--device", "cpu", "--data", "nowhere"]) == 2
    assert "bench_loader: data folder nowhere not found" in capsys.readouterr().err
