"""The suite: what it keeps, repeats and forgets; its page, its pictures and README's section."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import gpu_suite, readme
from benchmarks.gpu_suite import Part, Results
from benchmarks.measuring import command
from benchmarks.measuring.command import Finished
from benchmarks.measuring.command import run_limited as run_within
from benchmarks.measuring.record import ROOT
from benchmarks.reporting import NOT_MEASURED, draw_all, goals, write_page
from tests.processes import ForkedModule, in_processes
from tests.reference import import_timm

MODEL = "deit_digits_patch4_16"


def step_row(model: str, way: str, speed: float, memory: float = 10.0, first: float = 15.0) -> dict:
    ms = 512e3 / speed
    return {
        "key": {"op": "train_step", "model": model, "batch": 512, "precision": "bf16", "way": way},
        "ms": ms,
        "runs": [{"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms, "samples": 9}],
        "images_per_second": speed,
        "mfu_datasheet_percent": None,
        "mfu_roof_percent": 50.0,
        "memory_gib": memory,
        "first_step_s": first,
        "hours_300_epochs": 1.0,
        "part": "step",
    }


def op_row(way: str, ms: float) -> dict:
    key = {"op": "attention", "model": "B", "tokens": 197, "batch": 64, "way": way, "pass": "forward"}
    row = {"key": key, "ms": ms, "tflops": 100 / ms, "gbps": 1000 / ms, "roof_percent": 50.0, "part": "attention"}
    return row if way == "fused" else row | {"fused_speedup": ms}  # the fused op below takes 1 ms


def part_row(name: str, us: float, over: bool) -> dict:
    key = {"op": "breakdown", "model": "deit_base", "batch": 512, "way": "ours", "part": name}
    values = {"us_image": us, "floor_us": 42.0, "budget_us": 55.0, "over": over, "kernels": [["k<1>", us]]}
    return {"key": key, "ms": us, **values, "part": "breakdown"}


ROWS = [
    step_row("deit_base", "ours", 3000.0, memory=20.0),
    step_row("deit_base", "timm + compile", 1500.0, memory=40.0),
    step_row("deit_base", "timm", 1000.0),
    step_row("deit_small", "ours", 15000.0, first=25.0),
    {"key": {"op": "train_step", "model": "deit_base", "batch": 512, "way": "huggingface"}, "failed": "out of memory"},
    op_row("fused", 1.0),
    op_row("eager", 3.0),
    part_row("GEMM forward", 60.0, True),
    part_row("attention", 20.0, False),
    {"key": {"op": "tests", "scope": "telling"}, "counts": {"passed": 3, "failed": 1}},
    {"key": {"op": "tests", "scope": "telling", "test": "tests/x.py::test_y"}, "failed": "off by one"},
    {"key": {"op": "question", "question": "wgrad", "way": "fp32 sums"}, "ms": 1.5, "answer": "distance 1e-3"},
    {"key": {"op": "question", "question": "nccl"}, "failed": "took longer than 60 s"},
    {
        "key": {"op": "loader", "way": "decode", "decode": "cpu", "threads": 16},
        "absent": "no DALI",
    },
]


@pytest.fixture
def results(tmp_path) -> dict:
    """Made-up rows of an imaginary GPU."""
    data = Results(tmp_path / "made-up", "cpu", False).data
    data["facts"] |= {"gpu": "Imaginary GPU 9", "date": "2026-01-02T00:00:00+00:00"}
    return data | {"device": "cuda", "rows": ROWS, "roofs": {"tflops": 800.0, "gbps": 3000.0}}


def test_goals_are_judged_by_what_was_measured():
    lines = {line.name: line for line in goals(ROWS)}
    assert (lines["deit_base, images/s"].measured, lines["deit_base, images/s"].met) == ("3,000", False)
    assert lines["deit_base, images/s"].peer == "2.00 x timm + compile (1,500)"
    assert lines["deit_base, times the best peer"].met
    assert lines["deit_base, first step"].met
    assert (lines["deit_base, peak memory"].measured, lines["deit_base, peak memory"].met) == ("0.50 x", True)
    assert lines["deit_small, images/s"].met
    assert lines["deit_small, times the best peer"].measured == NOT_MEASURED
    assert lines["deit_small, first step"].met is False
    assert lines["deit_small, peak memory"].met is None
    assert lines["deit_tiny, images/s"].measured == NOT_MEASURED


def test_the_page_tells_everything(results):
    page = write_page(results, ["throughput.png"])
    for words in (
        "# Training speed on Imaginary GPU 9",
        "| deit_base, images/s | 5,100 | 3,000 | 2.00 x timm + compile (1,500) | no |",
        "| deit_base | 512 | huggingface | failed: out of memory |",
        "deit_base, batch 512: ours 3000.0 images/s, timm + compile 1500.0: 2.00 x the best peer.",
        "| GEMM forward | 60.0 | 42.0 | 55 | OVER | k 60.0 |",
        "| attention | B | 197 | 64 | forward | 1.0000 | 50 | eager 3.0000 | 3.00 x |",
        "| decode | cpu | 16 | absent: no DALI |",
        "- telling tests: 1 failed, 3 passed",
        "- FAILED `tests/x.py::test_y`: off by one",
        "- wgrad, fp32 sums: 1.5000 ms; distance 1e-3",
        "- nccl: failed: took longer than 60 s",
        "![throughput](throughput.png)",
    ):
        assert words in page


def test_a_page_with_nothing_says_so(tmp_path):
    data = Results(tmp_path, "cpu", True).data
    page = write_page(data)
    assert "rehearsal on CPU" in page
    assert page.count(NOT_MEASURED) > 12


def test_a_rehearsal_meets_no_goal(results):
    results["device"] = "cpu"
    assert "| deit_base, images/s | 5,100 | not yet measured |" in write_page(results)


def test_pictures_are_drawn_of_what_there_is(results, tmp_path):
    pytest.importorskip("matplotlib")
    names = draw_all(results, tmp_path)
    assert names == ["throughput.png", "roofline.png", "breakdown.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert draw_all(results | {"rows": []}, tmp_path) == []


# Keeping and repeating -----------------------------------------------------------------------------------------------


def test_results_are_taken_over_and_replaced_part_by_part(tmp_path):
    first = Results(tmp_path, "cpu", True)
    first.put("step", [{"key": {"way": "ours"}}], status="done", seconds=1.0)
    first.put("loader", [{"key": {"way": "decode"}}], status="cut off", seconds=1.0)
    again = Results(tmp_path, "cpu", True)
    assert again.done("step")
    assert not again.done("loader")
    again.put("loader", [{"key": {"way": "timm"}}], status="done", seconds=1.0)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["part"], row["key"]["way"]) for row in rows] == [("step", "ours"), ("loader", "timm")]


def test_other_sources_make_parts_out_of_date_and_another_machine_is_refused(tmp_path):
    results = Results(tmp_path, "cpu", True)
    results.put("step", [{"key": {"way": "ours"}}], status="done", seconds=1.0)
    results.data["facts"]["sources"] = "0"
    results.write()
    assert not Results(tmp_path, "cpu", True).done("step")
    results.data["facts"]["torch"] = "1.0"
    results.write()
    with pytest.raises(ValueError, match="another machine"):
        Results(tmp_path, "cpu", True)
    assert gpu_suite.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 2


def test_steps_measured_earlier_outlive_a_run_that_is_cut_off(tmp_path, monkeypatch):
    results = Results(tmp_path, "cpu", True)
    sources = results.data["facts"]["sources"]
    rows = [step_row("deit_base", way, 100.0) | {"sources": sources} for way in ("ours", "ours, fused")]
    results.put("step", rows, status="partly", seconds=1.0)
    monkeypatch.setattr(gpu_suite, "_command", lambda *_: ["timeit", "-n1", "-r1", "import time; time.sleep(60)"])
    options = argparse.Namespace(device="cpu", quick=True)
    gpu_suite.run_part(Part("step", 1.0, ("x",)), results, options, 0.3, io.StringIO())
    assert results.data["parts"]["step"]["status"] == "cut off"
    assert [row["key"]["way"] for row in results.data["rows"]] == ["ours", "ours, fused"]
    results.data["facts"]["sources"] = "0"  # the code has changed: ours must be measured again
    gpu_suite.run_part(Part("step", 1.0, ("x",)), results, options, 0.3, io.StringIO())
    assert results.data["rows"] == []


ROWS_THEN_HANG = """
import json, sys, time
rows = [{"key": {"op": "x"}, "ms": 1.0}]
with open(sys.argv[1], "w") as out:
    roofs = {"tflops": 1.0, "gbps": 2.0}
    json.dump({"theme": "x", "facts": {}, "rows": rows, "verdict": "fine so far", "roofs": roofs}, out)
print("told", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hanging_part(tmp_path, monkeypatch) -> Part:
    """A part that writes a row and hangs."""
    script = tmp_path / "hang.py"
    script.write_text(ROWS_THEN_HANG)
    runner = f"import runpy, sys; sys.argv[1:] = sys.argv[2:]; runpy.run_path({str(script)!r})"
    monkeypatch.setattr(gpu_suite, "_command", lambda *a: ["benchmarks.readme", "--x", str(a[-1])])

    def run_limited(command, seconds, tick):
        return run_within([sys.executable, "-c", runner, "", command[-1]], seconds, tick)

    monkeypatch.setattr(gpu_suite, "run_limited", run_limited)
    return Part("hang", 1.0, ("x",))


def test_a_part_that_is_killed_keeps_its_rows(tmp_path, hanging_part):
    results, log = Results(tmp_path, "cpu", True), io.StringIO()
    gpu_suite.run_part(hanging_part, results, argparse.Namespace(device="cpu", quick=True), 2, log)
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["rows"] == [{"key": {"op": "x"}, "ms": 1.0, "part": "hang"}]
    assert data["parts"]["hang"]["status"] == "cut off"
    assert data["parts"]["hang"]["notes"] == {"verdict": "fine so far"}
    assert data["roofs"] == {"tflops": 1.0, "gbps": 2.0}
    assert "told" in log.getvalue()


def test_a_suite_that_is_ended_keeps_the_rows_of_the_part_it_was_at(tmp_path, monkeypatch, hanging_part):
    run_limited = gpu_suite.run_limited

    def ended(command, seconds, tick):
        def once_there(out):
            if "told" in out:
                raise SystemExit(143)

        return run_limited(command, seconds, once_there)

    monkeypatch.setattr(gpu_suite, "run_limited", ended)
    monkeypatch.setattr(gpu_suite, "PARTS", (hanging_part, Part("never", 1.0, ("x",))))
    with pytest.raises(SystemExit):
        gpu_suite.main(["--device", "cpu", "--quick", "--minutes", "20", "--out", str(tmp_path)])
    data = json.loads((tmp_path / "results.json").read_text())
    assert [row["key"] for row in data["rows"]] == [{"op": "x"}]
    assert {name: part["status"] for name, part in data["parts"].items()} == {"hang": "cut off"}
    assert data["finished"]
    assert "part hang: cut off in" in (tmp_path / "page.md").read_text()


def test_first_it_is_verified_then_what_is_most_worth_knowing():
    names = [part.name for part in gpu_suite.PARTS]
    assert names[:4] == ["verify", "roof", "questions", "step"]
    for part in gpu_suite.PARTS:
        if part.command:
            assert importlib.util.find_spec(part.command[0]), part.name
    assert "GPU decoder" not in " ".join(part.name for part in gpu_suite.parts_for("cpu"))
    assert gpu_suite.parts_for("cuda") == gpu_suite.PARTS


def test_training_itself_is_a_part_whose_last_words_count(tmp_path, monkeypatch):
    results, options = Results(tmp_path, "cpu", True), argparse.Namespace(device="cpu", quick=True, data="digits")
    part = next(part for part in gpu_suite.PARTS if part.name == "smoke")
    command = gpu_suite._command(part, results, options, 60.0, tmp_path, tmp_path / "rows.json")
    assert command[:3] == ["deitfast", "train", "recipes/deit_digits.py"]
    assert (ROOT / command[2]).exists()
    for status, out, row in (
        (0, "step 3\nsmoke test passed\n", {"answer": "smoke test passed"}),
        (2, "", {"answer": "", "failed": "exit status 2: error: no data"}),
    ):
        finished = Finished(status, out, "error: no data", 9.0)
        monkeypatch.setattr(gpu_suite, "run_limited", lambda *_, finished=finished: finished)
        gpu_suite.run_part(part, results, options, 60.0, io.StringIO())
        (found,) = results.data["rows"]
        assert found == {"key": {"op": "smoke", "part": "smoke"}, "part": "smoke", **row}
        assert results.data["parts"]["smoke"]["status"] == ("done" if status == 0 else "failed")


def test_a_crash_and_a_hang_end_their_part_alone(tmp_path, monkeypatch, capsys):
    scripts = {"crash": "raise SystemExit('boom')", "hang": "import time; time.sleep(60)", "fine": "pass"}
    monkeypatch.setattr(gpu_suite, "PARTS", tuple(Part(name, 0.02 if name == "hang" else 1.0) for name in scripts))
    monkeypatch.setattr(gpu_suite, "_command", lambda part, *_: ["timeit", "-n1", "-r1", scripts[part.name]])
    run = gpu_suite.run_part
    # The hang gets half a second, whatever is left.
    monkeypatch.setattr(
        gpu_suite, "run_part", lambda p, r, o, s, log: run(p, r, o, 0.5 if p.name == "hang" else s, log)
    )
    arguments = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert gpu_suite.main([*arguments, "--minutes", "20"]) == 0
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "crash": "failed",
        "hang": "cut off",
        "fine": "done",
    }
    assert "boom" in parts["crash"]["problem"]
    assert "part hang: cut off" in (tmp_path / "page.md").read_text()
    capsys.readouterr()
    assert gpu_suite.main([*arguments, "--minutes", "20"]) == 0
    assert "fine" not in capsys.readouterr().out.replace(str(tmp_path), "")


SMALL = ("--model", MODEL, "--batch", "4")
QUICK_PARTS = (
    Part("verify", 2.0, ("benchmarks.verify",)),
    Part("roof", 1.0),
    Part("questions", 1.0, ("benchmarks.questions",), ("--only", "wgrad")),
    Part("step", 6.0, ("benchmarks.bench_train_step",), ("--models", MODEL, "--ways", "ours", "timm")),
    Part("breakdown", 1.0, ("benchmarks.breakdown",), SMALL),
    Part("attention", 1.0, ("benchmarks.micro", "attention"), ("--no-compile",)),
    Part("loader", 1.0, ("benchmarks.bench_loader",), ("--ways", "decode", "augmented, decode once")),
)


def _quick_suite(_: int, folder: Path, printed: Path) -> None:
    """The suite, whose parts and their workers are forks of this process instead of ten that import torch anew."""
    import_timm()
    for part in QUICK_PARTS:
        importlib.import_module(part.command[0] if part.command else "benchmarks.measuring.train_steps")
    forking = SimpleNamespace(Popen=ForkedModule, TimeoutExpired=subprocess.TimeoutExpired)
    arguments = ["--device", "cpu", "--quick", "--minutes", "8", "--out", str(folder)]
    with (
        mock.patch.object(command, "subprocess", forking),
        mock.patch.object(gpu_suite, "PARTS", QUICK_PARTS),
        open(printed, "w") as out,
        contextlib.redirect_stdout(out),
    ):
        assert gpu_suite.main(arguments) == 0


@pytest.mark.slow
def test_the_quick_suite_ends_with_one_page(tmp_path):
    folder, printed = tmp_path / "suite", tmp_path / "printed"
    in_processes(_quick_suite, 1, folder, printed)
    assert f"{MODEL}, batch 8: ours" in printed.read_text()
    data = json.loads((folder / "results.json").read_text())
    assert {name: part["status"] for name, part in data["parts"].items()} == dict.fromkeys(
        [p.name for p in QUICK_PARTS], "done"
    )
    assert {row["part"] for row in data["rows"]} == {"verify", "questions", "step", "breakdown", "attention", "loader"}
    page = (folder / "page.md").read_text()
    assert " passed" in page.split("## Is it right?")[1].split("##")[0]
    assert "fp32 sums" in page.split("## Questions")[1].split("##")[0]
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "log.txt", "page.md", "throughput.png", "roofline.png", "breakdown.png",
    }  # fmt: skip


def test_mistakes_end_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--device", "cpu"])
    assert "--out DIR is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), "--only", "everything"])


# README --------------------------------------------------------------------------------------------------------------


def test_readme_is_up_to_date_with_the_results():
    text = (ROOT / "README.md").read_text()
    assert readme.rewritten(text, readme.section(readme.newest(readme.RESULTS))) == text, (
        "run python -m benchmarks.readme"
    )


def test_goals_are_told_before_anything_is_measured(tmp_path, capsys):
    assert readme.main(["--goals", "--results", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("deit_base, inference", "deit_base on 8 GPUs", "hours to the paper's accuracy"):
        assert [line.count(NOT_MEASURED) for line in lines if name in line] == [1]


def test_readme_takes_the_newest_results_of_a_gpu(results, tmp_path, capsys):
    folder, store, target = tmp_path / "run", tmp_path / "results", tmp_path / "README.md"
    target.write_text(f"# x\n{readme.BEGIN}\nold\n{readme.END}\nend\n")
    arguments = ["--readme", str(target), "--results", str(store)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    assert target.read_text() == f"# x\n{readme.BEGIN}\nNot yet measured on a GPU.\n{readme.END}\nend\n"
    assert readme.main([*arguments, "--check"]) == 0
    folder.mkdir()
    for date, device in (("2026-01-02", "cuda"), ("2026-01-01", "cuda"), ("2026-01-03", "cpu")):
        results["facts"]["date"], results["device"] = f"{date}T00:00:00+00:00", device
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "page.md").write_text("![throughput](throughput.png)")
        (folder / "throughput.png").write_bytes(b"")
        assert readme.main([*arguments, "--add", str(folder)]) == 0
    text = target.read_text()
    assert "benchmarks/results/suite_imaginary-gpu-9_2026-01-02.md" in text
    assert "| deit_base, images/s | 5,100 | 3,000 |" in text
    assert "huggingface" not in text
    page = (store / "suite_imaginary-gpu-9_2026-01-02.md").read_text()
    assert page == "![throughput](suite_imaginary-gpu-9_2026-01-02_throughput.png)"
    target.write_text("no markers")
    assert readme.main(arguments) == 2
    assert capsys.readouterr().err.endswith("once each and in this order\n")
