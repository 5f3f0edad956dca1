"""`deitfast doctor` where there are GPUs: the table of kernels, and choices that another run takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.cli.main import main
from deitfast.errors import DeitfastError
from deitfast.kernels.gemm import linear_launch
from deitfast.kernels.replaced import EAGER, chosen
from deitfast.kernels.tunable import Selection, described, picked, recorded, selection
from deitfast.training.first_contact import read_choices
from deitfast.use import doctor
from deitfast.use.doctor import examine
from deitfast.verification import warm
from deitfast.verification.choice import Offers
from deitfast.verification.verdict import Verdict
from tests.rehearsal.test_first_contact import SHORT, forms, plant, run, takes
from tests.verification.planted import FAULTS

SELECTION = "linear_launch itemsize=2 N=512 K=128 epilogue=gelu aligned_rows=True"
COMMAND = ["doctor", "--model", "deit_digits_patch4_16", "--batch", "8", "--data", "digits"]


pytestmark = pytest.mark.usefixtures("a_gpu_seen_for_the_first_time")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitfast.use.doctor._LOADING_SECONDS", 0.2)
    monkeypatch.setattr("deitfast.use.doctor._LOADED_AT_ONCE", 4)


def test_the_table_is_printed_and_a_run_takes_its_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr("deitfast.use.doctor._compiler", lambda _: [])
    plant(monkeypatch, FAULTS["wrong in its last column"][0]())
    with chosen():
        main([*COMMAND, "--out", str(tmp_path)])
        shown = capsys.readouterr()
        main([*COMMAND, "--out", str(tmp_path), "--json"])
        found = json.loads(capsys.readouterr().out)
    assert "verifying 9 kernels on this Pretended H100, once" in shown.err
    assert "GPU 3: Pretended H100, 80 GiB, sm_90" in shown.out
    assert "8 of 9 ops run their kernels here" in shown.out
    assert "the GPU decodes these images as libjpeg does" in shown.out
    rows = {line.split()[0]: line for line in shown.out.split("\n\n")[1].splitlines()[1:]}
    assert len(rows) == 9
    assert "ours 1.000, eager 1.000" in rows["patch_embed"]  # the clock ticks once a replay
    assert "largest error" in rows["layernorm_mlp"]
    assert forms(found)["layernorm_mlp"] == EAGER
    choices = tmp_path / "choices.json"
    choices.write_text(json.dumps(found))
    _, _, facts = run(tmp_path / "run", replace(SHORT, fused=str(choices)))
    assert forms(facts) == forms(found)
    elsewhere = read_choices(choices, torch.device("cpu"))
    assert elsewhere.forms == forms(found)
    assert not elsewhere.launches, "entries of launch tables are for the GPU that they were found on"


def test_a_search_is_kept_and_what_it_found_is_tried_by_the_runs_to_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    only_the_tables_entries: Callable[..., Any],
) -> None:  # fmt: skip
    monkeypatch.setattr("deitfast.use.doctor._compiler", lambda _: [])
    monkeypatch.setattr("deitfast.use.doctor._nccl", lambda _: [])

    def last(self: Offers, asked: Selection) -> list[Any]:
        return only_the_tables_entries(self, asked)[-1:] if asked.name == SELECTION else []

    monkeypatch.setattr(Offers, "of", last)
    compiled: list[str] = []

    def compile_all(case: Any, selection: str, entries: Sequence[Any], seconds: float) -> Iterator[int]:
        compiled.append(selection)  # other processes have no pretended GPU
        yield from range(1, len(entries) + 1)

    monkeypatch.setattr(warm, "compile_all", compile_all)
    wanted = selection(linear_launch, 90, 2, 512, 128, "gelu", True).space[-1]
    takes(monkeypatch, "layernorm_mlp", lambda way: 0.4 if way == described(wanted) else 0.8 if "," in way else 1.0)
    with chosen(), picked({}):
        main([*COMMAND, "--out", str(tmp_path), "--tune"])
        shown = capsys.readouterr()
    assert "searching the launch constants of 7 ops on this Pretended H100, 10 min" in shown.err
    assert SELECTION in compiled
    assert "1 are faster here, and kept for runs" in shown.out
    assert f"layernorm_mlp, {SELECTION}: {wanted}" in shown.out
    monkeypatch.setattr(warm, "compile_all", lambda *_: pytest.fail("searched again"))
    _, log, facts = run(tmp_path / "run")
    assert f"{SELECTION}: {wanted}" in log
    found = {name: entry for op in facts["choices"]["kernels"]["ops"] for name, entry in op["launches"].items()}
    assert found[SELECTION] == recorded(wanted)


@pytest.mark.parametrize(("gpus", "level"), [(1, "note"), (2, "breaks")])
def test_several_gpus_need_nccl(gpus: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    (finding,) = doctor._nccl(gpus)
    assert finding.level == level


@pytest.mark.parametrize("gpus", [0, 1])
def test_fewer_gpus_need_less(
    gpus: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr("deitfast.use.doctor.missing_for_triton", lambda: "there is no Python.h. Install it")
    monkeypatch.setattr("deitfast.use.doctor.verify", lambda *_: Verdict())
    with chosen():
        found = examine("deit_digits_patch4_16", 8, "digits", tmp_path, print)
    if gpus == 0:
        with pytest.raises(DeitfastError, match="--tune searches on the GPU"):
            examine("deit_digits_patch4_16", 8, "digits", tmp_path, print, tune_minutes=1)
    assert found.breaks == (gpus == 1)  # for want of Python.h
    assert (found.kernels is None) == (gpus == 0)
    assert "this torch has no NCCL" in next(str(f) for f in found.findings if "NCCL" in f.what and f.level == "note")
