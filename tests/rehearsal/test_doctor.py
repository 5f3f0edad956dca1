"""`deitfast doctor` where there are GPUs: the table of kernels, and choices that another run takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deitfast.cli.main import main
from deitfast.kernels.replaced import EAGER, chosen
from deitfast.use import doctor
from deitfast.use.doctor import examine
from tests.rehearsal.test_first_contact import SHORT, forms, plant, run
from tests.verification.planted import FAULTS

COMMAND = ["doctor", "--model", "deit_digits_patch4_16", "--batch", "8", "--data", "digits"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deitfast.use.doctor._LOADING_SECONDS", 0.2)


def test_the_table_is_printed_and_a_run_takes_its_choices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEITFAST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    monkeypatch.setattr("deitfast.use.doctor._compiler", lambda _: [])
    plant(monkeypatch, FAULTS["wrong in its last column"][0]())
    with chosen():
        main([*COMMAND, "--out", str(tmp_path)])
        shown = capsys.readouterr()
        main([*COMMAND, "--out", str(tmp_path), "--json"])
        found = json.loads(capsys.readouterr().out)
    assert "verifying 5 kernels on this Pretended H100, once" in shown.err
    assert "GPU 3: Pretended H100, 80 GiB, sm_90" in shown.out
    assert "4 of 5 ops run their kernels here" in shown.out
    assert "the GPU decodes these images as libjpeg does" in shown.out
    rows = {line.split()[0]: line for line in shown.out.split("\n\n")[1].splitlines()[1:]}
    assert len(rows) == 5
    assert "ours 0.100, eager 0.100" in rows["patch_embed"]  # a millisecond of ten replays
    assert "largest error" in rows["layernorm_mlp"]
    assert forms(found)["layernorm_mlp"] == EAGER
    choices = tmp_path / "choices.json"
    choices.write_text(json.dumps(found))
    _, _, facts = run(tmp_path / "run", replace(SHORT, fused=str(choices)))
    assert forms(facts) == forms(found)


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
    with chosen():
        found = examine("deit_digits_patch4_16", 8, "digits", tmp_path, print)
    assert found.breaks == (gpus == 1)  # for want of Python.h
    assert (found.kernels is None) == (gpus == 0)
    assert "this torch has no NCCL" in next(str(f) for f in found.findings if "NCCL" in f.what and f.level == "note")
