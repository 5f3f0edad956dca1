"""--profile: a trace and a table of what a step did, and nothing else left behind."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deitfast.recipes.deit_digits import RECIPE
from deitfast.training.launch import run
from deitfast.training.run_folder import fitted


def test_a_profile_holds_the_ops_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run(RECIPE, name="x", arguments=["--profile", "traced", "--workers", "1"])
    assert {path.name for path in tmp_path.iterdir()} == {"traced"}, "no run folder"
    events = json.loads((tmp_path / "traced" / "trace.json").read_text())["traceEvents"]
    products = [event for event in events if event.get("name") == "aten::addmm"]
    assert len(products) % 5 == 0, "five steps are alike"
    assert products
    table = (tmp_path / "traced" / "table.txt").read_text()
    assert re.search(r"5 steps of 32 images after 5 to warm up, [\d.]+ ms a step under the profiler", table)
    assert table.strip() in capsys.readouterr().out


def test_help_is_in_groups_under_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(RECIPE, name="x", description="What it is.", arguments=["--help"])
    said = capsys.readouterr().out
    assert len(said.split("\n\n")[0].splitlines()) == 1, "the usage"
    headings = re.findall(r"^([a-z][a-z ]+):$", said, re.MULTILINE)
    assert headings[-8:] == [
        "what is trained", "optimisation", "regularisation", "distillation", "augmentation", "evaluation",
        "this machine", "this command",
    ]  # fmt: skip
    assert said.index("--drop-path ") < said.index("--repeats") < said.index("--out") < said.index("--smoke")


def test_the_progress_line_fits_its_terminal() -> None:
    line = (
        "ep 12/300 step 15012/375300 4.0% | loss 3.412 lr 4.8e-04 | 4431 img/s wait 10.4% (process 3) mem 61/80G "
        "| top1 41.2@11 | eta 23h02m | skip 2 | faults: crash 1"
    )
    assert fitted(line, 200) == line
    assert fitted(line, 100) == (
        "ep 12/300 4.0% | loss 3.412 | 4431 img/s | top1 41.2@11 | eta 23h02m | skip 2 | faults: crash 1"
    )
    short = line.split(" | skip")[0]
    assert fitted(short, 80) == "ep 12/300 4.0% | loss 3.412 | 4431 img/s | top1 41.2@11 | eta 23h02m"
    assert all(len(fitted(line, columns)) < columns for columns in range(20, 200))
