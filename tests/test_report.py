"""report.html beside what metrics.jsonl, the weights and the recipe say, worked out here a second time."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import deitfast
from benchmarks.paper.training import write_subset
from deitfast.cli.main import main
from deitfast.recipes.deit_digits import RECIPE
from deitfast.training.charts import thinned

BATCH, IMAGES = 16, 230
"""An epoch is 14 steps."""
DIGITS = Path(deitfast.__file__).parent / "data" / "digits"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    out, data = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "data"))
    write_subset("digits", data, IMAGES // 10)
    recipe = replace(RECIPE, data=str(data), epochs=2, batch=BATCH, warmup_epochs=1, eval_every=1, workers=1)
    deitfast.train(replace(recipe, out=str(out)))
    return out


@pytest.fixture(scope="module")
def broken(run: Path) -> Path:
    """The same as if it had died at step 20, gone back to 15 and died again, the second time while it wrote."""
    out = run.with_name("broken")
    shutil.copytree(run, out)
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    again = [json.dumps(json.loads(line) | {"loss": 7.0}).encode() for line in lines[15:18]]
    (out / "metrics.jsonl").write_bytes(b"\n".join([*lines[:20], *again, lines[18][:9]]))
    (out / "progress.json").write_text('{"step": 19, "saved": 15, "running": true}')
    (out / "log.txt").write_text("".join((out / "log.txt").read_text().splitlines(keepends=True)[:-1]))
    faults = [
        {"kind": "crash", "step": 20, "cause": "killed <b>without</b> a word"},
        {"kind": "failed save", "step": 18},
    ]
    (out / "faults.jsonl").write_text("".join(json.dumps(fault) + "\n" for fault in faults) + '{"ki')
    return out


def lines_of(run: Path, key: str) -> Iterator[dict[str, Any]]:
    for line in (run / "metrics.jsonl").read_text().splitlines():
        if f'"{key}"' in line:
            yield json.loads(line)


def report(tmp_path: Path, *arguments: str | Path) -> str:
    out = tmp_path / "page" / "report.html"
    main(["report", *map(str, arguments), "--out", str(out), "--device", "cpu"])
    return out.read_text()


def numbers(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def cells(page: str) -> list[list[str]]:
    """The text of every row of every table."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.replace("\u00a0", " "), re.DOTALL)
    return [[re.sub("<[^>]+>", "", cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def summary(page: str) -> list[dict[str, str]]:
    """The first table, a dictionary a run."""
    rows = cells(page[: page.index("</table>")])
    return [dict(zip([row[0] for row in rows], column, strict=True)) for column in list(zip(*rows, strict=True))[1:]]


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("page"), run, "--price", "3")


def test_the_curves_are_those_of_the_metrics(run: Path, page: str) -> None:
    drawn = numbers(page)
    steps, evaluations = list(lines_of(run, "lr")), list(lines_of(run, "top1"))
    assert [line["step"] for line in steps] == list(range(1, 2 * (IMAGES // BATCH) + 1))
    for key, factor in (("loss", 1), ("lr", 1), ("images_per_second", 1), ("data_wait", 100)):
        (series,) = drawn[key]
        assert series["epochs"] == [line["epoch"] for line in steps]
        assert series["values"] == pytest.approx([factor * line[key] for line in steps])
    raw, averaged = drawn["accuracy"]
    assert raw["values"] == [line["top1"] for line in evaluations]
    assert averaged["values"] == [line["ema_top1"] for line in evaluations]
    assert (raw["averaged"], averaged["averaged"]) == (False, True)
    (loss,) = drawn["val_loss"]
    assert loss["epochs"] == [line["epoch"] for line in evaluations] == [1, 2]
    assert loss["values"] == [line["val_loss"] for line in evaluations]
    assert "memory" not in drawn
    assert "mfu" not in drawn, "a CPU has no datasheet here"


def test_every_curve_is_drawn(page: str) -> None:
    assert page.count("<svg") == len(numbers(page))
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "pictures share names"


def test_the_summary_is_worked_out_from_the_metrics(run: Path, page: str) -> None:
    (told,) = summary(page)
    steps, evaluations = list(lines_of(run, "lr")), list(lines_of(run, "top1"))
    seconds = sum(BATCH / line["images_per_second"] for line in steps)  # a line a step on a CPU
    assert told["state"] == "ended"
    assert told["steps"] == str(len(steps))
    assert float(told["images/s"].replace(",", "")) == pytest.approx(BATCH * len(steps) / seconds, abs=1)
    assert int(told["training"].rstrip("s")) == int(seconds)
    best = max(max(line["top1"], line["ema_top1"]) for line in evaluations)
    assert told["top-1 best"].startswith(f"{best:.2f} %")
    last = evaluations[-1]
    assert told["last raw / EMA"] == f"{last['top1']:.2f} / {last['ema_top1']:.2f} %"
    assert told["cost"] == "-", "no GPU, no price"


def test_the_best_weights_are_evaluated_as_in_the_run(run: Path, page: str) -> None:
    best = max(max(line["top1"], line["ema_top1"]) for line in lines_of(run, "top1"))
    found = re.search(r"Top-1 ([\d.]+) %, top-5 [\d.]+ % on 360 validation images", page)
    assert found
    assert float(found[1]) == pytest.approx(best, abs=0.005)
    worst = [row for row in cells(page) if len(row) == 4 and row[1].endswith("%")]
    assert len(worst) == 10
    right = sum(float(row[1].rstrip(" %")) * int(row[2]) / 100 for row in worst)  # all ten classes are among the ten
    assert 100 * right / 360 == pytest.approx(best, abs=0.05)
    assert [float(row[1].rstrip(" %")) for row in worst] == sorted(float(row[1].rstrip(" %")) for row in worst)


def test_confusion_and_calibration_are_those_of_timms_model_on_the_same_images(run: Path, page: str, timm) -> None:
    """The best weights in timm's own network, on images that PIL decoded; scores worked out in NumPy."""
    with tarfile.open(DIGITS / "val.tar") as archive:
        members = archive.getmembers()
        pixels = np.stack([np.asarray(Image.open(archive.extractfile(m)).convert("RGB")) for m in members])
    label = np.array([int(m.name.split("/")[0]) for m in members])
    model = timm.models.VisionTransformer(16, 4, num_classes=10, embed_dim=128, depth=4, num_heads=4)
    model.load_state_dict(load_file(run / "best" / "model.safetensors"))
    mean, std = (np.array(timm.data.constants.__dict__[f"IMAGENET_DEFAULT_{name}"]) for name in ("MEAN", "STD"))
    images = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        p = model.eval()(images).double().softmax(1).numpy()
    answer, confidence = p.argmax(1), p.max(1)
    right = answer == label
    among_five = (p.argsort(1)[:, -5:] == label[:, None]).any(1)
    ece = sum(
        abs(confidence[held].mean() - right[held].mean()) * held.mean()
        for i in range(15)
        if (held := (confidence > i / 15) & (confidence <= (i + 1) / 15)).any()
    )
    found = re.search(r"Top-1 ([\d.]+) %, top-5 ([\d.]+) % on 360 validation images; calibration error (\d\.\d+)", page)
    assert found
    assert [float(x) for x in found.groups()] == pytest.approx(
        [100 * right.mean(), 100 * among_five.mean(), ece], abs=0.0051
    )
    told = {row[0]: row for row in cells(page) if len(row) == 4 and row[1].endswith("%")}
    for digit in range(10):
        taken = np.bincount(answer[label == digit], minlength=10)
        _, top1, images_of, other = told[str(digit)]
        assert int(images_of) == taken.sum()
        assert float(top1.rstrip(" %")) == pytest.approx(100 * taken[digit] / taken.sum(), abs=0.051)
        taken[digit] = 0
        assert other == (f"{taken.argmax()} ({taken.max()})" if taken.any() else "-")


def test_hours_cost_and_mfu_are_worked_out_from_a_gpus_run(run: Path, tmp_path: Path) -> None:
    """A run on two H100 as its folder would state it: a step took 100 s, the clock ran for two hours and a half."""
    out = tmp_path / "two"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("ckpt", "best"))
    steps = list(lines_of(run, "lr"))
    lines = [line | {"images_per_second": 0.01 * BATCH, "memory_gib": 40.0 + line["step"]} for line in steps]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    environment = json.loads((out / "env.json").read_bytes())
    environment |= {"gpu": {"name": "NVIDIA H100 80GB HBM3", "count": 2, "cuda": "13.0"}}
    environment["choices"] |= {"processes": 2}
    (out / "env.json").write_text(json.dumps(environment))
    stated = json.loads((out / "recipe.json").read_bytes()) | {"model": "deit_base_patch16_224"}
    (out / "recipe.json").write_text(json.dumps(stated))
    (out / "log.txt").write_text("2026-01-01 23:00:00 begun\n2026-01-02 01:30:20 done: top-1 50.00 %\n")
    page = report(tmp_path, out, "--quick", "--price", "3")
    (told,) = summary(page)
    assert told["training"] == "46m40s"  # 28 steps
    assert len(steps) == 28
    assert told["wall clock"] == "2h30m"
    assert float(told["cost"]) == pytest.approx(3 * 2 * 2800 / 3600, abs=0.005)
    drawn = numbers(page)
    (memory,), (mfu,) = drawn["memory"], drawn["mfu"]
    assert memory["values"] == [line["memory_gib"] for line in lines]
    # 17.58 G multiply-adds forward are published for DeiT-B, 989.4 TFLOP/s for the GPU
    assert mfu["values"] == pytest.approx([100 * 0.01 * BATCH * 6 * 17.58e9 / (2 * 989.4e12)] * 28, rel=0.01)
    assert "torchrun --nproc-per-node 2 " in page


def test_it_says_how_to_run_again_and_how_it_differs(run: Path, page: str) -> None:
    for line in replace(RECIPE, epochs=2, batch=BATCH, warmup_epochs=1).deviations(IMAGES):
        assert line.replace("'", "&#x27;") in page
    environment = json.loads((run / "env.json").read_bytes())
    assert environment["torch"] in page
    assert "What training saw" in page


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    links = Links()
    links.feed(page)
    assert links.found
    assert not [link for link in links.found if not link.startswith(("data:", "#"))]
    assert "@import" not in page


def test_a_run_that_died_is_told_as_far_as_it_came(run: Path, broken: Path, tmp_path: Path) -> None:
    both = report(tmp_path, run, broken, "--quick")
    beside = summary(both)
    assert [told["run"] for told in beside] == ["whole", "broken"]
    assert beside[1]["state"] == "running, or died without a word"
    assert beside[1]["steps"] == "19"
    whole, second = numbers(both)["loss"]
    steps = list(lines_of(run, "lr"))[:19]  # among 20 lines is one of an evaluation, after step 14
    assert second["values"] == [7.0 if line["step"] in (15, 16, 17) else line["loss"] for line in steps]
    assert len(whole["values"]) > 20
    (faults,) = numbers(both)["faults"]
    assert faults["values"] == [0, 1, 2, 2]
    assert faults["epochs"] == pytest.approx([0, 18 / 14, 20 / 14, 20 / 14], abs=1e-3)
    assert "killed &lt;b&gt;without&lt;/b&gt; a word" in both
    assert "What training saw" not in both


def test_what_cannot_be_looked_at_is_said(broken: Path, tmp_path: Path) -> None:
    stated = json.loads((broken / "recipe.json").read_bytes())
    (broken / "recipe.json").write_text(json.dumps(stated | {"data": "/nowhere"}))
    page = report(tmp_path, broken)
    assert "no images: " in page
    assert "/nowhere" in page
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2


def test_long_curves_become_means_of_stretches() -> None:
    values = np.arange(2501.0)
    short = thinned(values.tolist())
    assert len(short) == 834
    assert short[0] == 1.0  # of 0, 1, 2
    assert short[-1] == np.mean(values[2499:])
