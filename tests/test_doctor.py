"""`deitfast doctor` on a machine without a GPU: findings in words, each with its remedy, and an exit code."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deitfast.cli.main import main
from deitfast.errors import DeitfastError
from deitfast.use import doctor
from deitfast.use.doctor import BREAKS, NOTE, OK, Finding, examine, table
from deitfast.verification.verdict import OpVerdict, Verdict


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOADING_SECONDS", 0.5)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = 0
    try:
        main(["doctor", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_why_there_is_no_table_and_nothing_breaks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out = run(capsys, "--data", "digits", "--out", str(tmp_path / "runs"))
    assert code == 0
    for words in (
        f"torch {torch.__version__}",
        "no GPU: everything runs on the CPU, in eager PyTorch",
        "1,437 training images of 10 classes",
        "one process reads, decodes and augments",
        "no table of kernels: they are verified on the GPU that they run on, and there is none here",
    ):
        assert words in out
    assert "breaks" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "minutes", "told"), [(0, 10, "--tune searches on the GPU"), (1, -1, "-1 minutes"), (1, math.nan, "nan m")]
)
def test_a_search_is_refused_where_no_gpu_is_and_for_no_time(
    gpus: int, minutes: float, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(DeitfastError, match=told):
        examine("deit_digits_patch4_16", 8, "", tmp_path, print, tune_minutes=minutes)


def test_data_that_is_not_there_breaks_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out = run(capsys, "--data", "/nowhere", "--out", str(tmp_path), "--json")
    assert code == 1
    found = json.loads(out)
    broken = [finding["what"] for finding in found["findings"] if finding["level"] == BREAKS]
    assert broken == [next(what for what in broken if "/nowhere not found" in what)]
    assert found["environment"]["torch"] == torch.__version__


def test_the_throughput_is_of_the_images_that_came(tmp_path: Path) -> None:
    """Of so few images the batch is smaller; of one there is none."""
    from deitfast.data import open_dataset

    images = open_dataset("digits", split="train").train
    assert images is not None
    (found,) = doctor._loading(images.head(20), torch.device("cpu"))
    assert found.level == OK
    told = re.search(r"augments ([\d,]+) images/s in ([\d.]+) s", found.what)
    assert told
    assert float(told[1].replace(",", "")) > 0
    assert float(told[2]) < 30
    assert list(doctor._loading(images.head(1), torch.device("cpu"))) == []


def findings(check: Any, *arguments: Any) -> list[tuple[str, str]]:
    return [(finding.level, str(finding)) for finding in check(*arguments)]


@pytest.mark.parametrize(("gpus", "level"), [(0, NOTE), (1, BREAKS)])
def test_a_missing_compiler_breaks_runs_on_gpus_alone(gpus: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "missing_for_triton", lambda: "this machine has no C compiler. Install gcc")
    [(found, text)] = findings(doctor._compiler, gpus)
    assert found == level
    assert text.endswith("this machine has no C compiler. Install gcc")


@pytest.mark.parametrize(
    ("cuda", "known", "level", "words"),
    [
        (None, "580.95", BREAKS, "built for CPUs alone. Install a torch with CUDA"),
        ("13.0", "450.1", BREAKS, "built for CUDA 13.0, finds no GPU under driver 450.1. Update the driver"),
        ("13.0", "", NOTE, "no GPU: everything runs on the CPU"),
    ],
)
def test_a_gpu_that_torch_does_not_find_is_told(
    cuda: str | None, known: str, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "driver", lambda: known)
    [(found, text)] = findings(doctor._gpus, 0)
    assert found == level
    assert words in text


def test_a_gpu_too_old_for_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(total_memory=16 << 30, name="Tesla V100", major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: old)
    found = findings(doctor._gpus, 1)
    assert [level for level, _ in found] == [OK, BREAKS, OK]
    assert "Tesla V100, 16 GiB, sm_70" in found[0][1]


@pytest.mark.parametrize(
    ("size", "gpus", "level"), [(64 << 20, 0, NOTE), (64 << 20, 2, BREAKS), (1 << 30, 8, OK), (None, 8, BREAKS)]
)
def test_shared_memory_too_small_for_several_gpus_breaks(
    size: int | None, gpus: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Any) -> Any:
        if size is None:
            raise OSError
        return SimpleNamespace(total=size)

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    [(found, text)] = findings(doctor._shared_memory, gpus)
    assert found == level
    assert ("docker run" in text) == (level != OK)


def test_a_disk_that_is_slow_full_or_closed_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=3e9))
    monkeypatch.setattr(doctor, "_write_speed", lambda _: 20e6)
    assert [level for level, _ in findings(doctor._disk, tmp_path / "a" / "b")] == [NOTE, NOTE]

    def closed(_: Path) -> float:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor, "_write_speed", closed)
    level, text = findings(doctor._disk, tmp_path)[-1]
    assert level == BREAKS
    assert "Read-only file system. Give --out" in text


def test_the_speed_of_a_disk_is_of_a_file_that_is_gone_afterwards(tmp_path: Path) -> None:
    assert doctor._write_speed(tmp_path, size=1 << 20) > 0
    assert not list(tmp_path.iterdir())


def test_too_few_cores_for_a_gpu_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cores", lambda: 6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    [(level, text)] = findings(doctor._cores, 2)
    assert level == NOTE
    assert "3 core(s) a process" in text
    assert [level for level, _ in findings(doctor._cores, 1)] == [OK]


def test_nccl_is_missed_by_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert [level for level, _ in findings(doctor._nccl, 2)] == [BREAKS]
    assert [level for level, _ in findings(doctor._nccl, 1)] == [NOTE]
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    assert [text for _, text in findings(doctor._nccl, 2)] == ["ok     NCCL 2.27.5, over which several GPUs train"]


def test_a_dali_for_another_cuda_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.device) -> None:
        raise DeitfastError("DALI is built for CUDA 13 and this machine's driver knows CUDA 12. Update the driver")

    monkeypatch.setattr(doctor, "check_build", refuse)
    assert [level for level, _ in findings(doctor._dali, 1)] == [BREAKS]
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    [(level, text)] = findings(doctor._dali, 0)
    assert (level, "is missing" in text) == (BREAKS, True)


def test_the_table_has_a_row_an_op_and_the_summary_counts_them() -> None:
    verdict = Verdict([OpVerdict("mlp", ms={"ours": 0.25, "eager": 0.5}), OpVerdict("embed", "eager", "it raises: X")])
    head, mlp, embed = table(verdict).splitlines()
    assert head.split("  ")[0] == "op"
    assert mlp == "mlp    ours     ours 0.250, eager 0.500"
    assert embed.split() == ["embed", "eager", "it", "raises:", "X"]
    assert embed.index("it") == head.index("why")
    assert [str(finding) for finding in doctor._kernels(verdict)] == [
        "note   1 of 2 ops run their kernels here; the others run as eager PyTorch"
    ]
    unverified = list(doctor._kernels(Verdict(unverified="its process ended")))
    assert unverified[0] == Finding(NOTE, "the kernels could not be verified: its process ended", "Run this again")


def test_its_help_waits_for_nothing() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "deitfast", "doctor", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "exit 1 if anything would" in result.stdout or "--data" in result.stdout
    assert " torch" not in result.stderr
