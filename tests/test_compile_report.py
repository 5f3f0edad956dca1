"""The compile report passes what is right and catches each planted fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile_report
from deitfast.kernels.common import INTERPRETED
from tests.planted_kernels import planted

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing can be compiled under TRITON_INTERPRET=1")

PACKAGE = "tests.planted_kernels"


def compile_planted(name: str, arch: int) -> compile_report.Result:
    (case,) = [case for case in planted.compile_cases(arch) if case.name == name]
    return compile_report.compile_case(case, arch)


@pytest.mark.parametrize(("arch", "kind"), [(0, "HMMA"), (80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_good_matrix_kernel_passes_and_names_its_instruction(arch, kind):
    result = compile_planted("good_matmul", arch)
    assert result.failures == ()
    assert result.tensor_core.keys() == {kind}
    assert result.threads == 128
    assert 16 <= result.registers <= 255
    # Two or more stages of two (64, 64) bf16 tiles, less than eight.
    assert 2 * 2 * 64 * 64 <= result.shared <= 8 * 2 * 64 * 64 * 2
    assert result.ctas_per_sm >= 2


def test_a_kernel_without_matmul_needs_no_tensor_core():
    result = compile_planted("good_row_sum", 90)
    assert result.failures == ()
    assert result.tensor_core == {}


@pytest.mark.parametrize(
    ("name", "arch", "failure"),
    [
        ("bad_spill", 90, "spills"),
        ("bad_shared_memory", 0, "exceeds 99 KB"),
        ("bad_shared_memory", 90, "exceeds 227 KB"),
        ("bad_no_wgmma", 90, "matrix kernel without [HQ]GMMA on sm_90"),
        ("bad_serialised", 90, "wgmma serialised (C75"),
        ("bad_syntax", 90, "does not compile: ValueError: Shape element 0 must be a power of 2"),
        ("bad_signature", 90, "arguments without a type or value: ['COLUMNS']"),
    ],
)
def test_each_fault_is_named(name, arch, failure):
    assert any(failure in found for found in compile_planted(name, arch).failures), compile_planted(name, arch)


def test_the_verdict_is_the_same_from_tritons_cache():
    assert compile_planted("bad_serialised", 90).failures == compile_planted("bad_serialised", 90).failures


def test_ctas_per_sm_takes_the_tightest_limit():
    chip = compile_report.CHIPS[90]
    assert compile_report.ctas_per_sm(chip, registers=32, threads=128, shared=0) == 16  # 2048 threads
    assert compile_report.ctas_per_sm(chip, registers=16, threads=32, shared=0) == 32  # blocks
    assert compile_report.ctas_per_sm(chip, registers=232, threads=256, shared=0) == 1  # 65536 registers
    assert compile_report.ctas_per_sm(chip, registers=129, threads=128, shared=0) == 3  # 129 is allocated as 136
    assert compile_report.ctas_per_sm(chip, registers=32, threads=128, shared=113 << 10) == 2  # 228 KB less 1 a block
    assert compile_report.ctas_per_sm(compile_report.CHIPS[100], 32, 128, 0, tensor_memory=256) == 2


def test_the_command_fails_on_a_failure_and_writes_json(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert compile_report.main(["--arch", "90", "--only", "bad_sig*ure", "--json", str(path)], package=PACKAGE) == 1
    assert "FAILED sm_90 bad_signature: does not compile: ValueError" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())
    assert result["name"] == "bad_signature"
    assert result["failures"]
    assert compile_report.main(["--arch", "90", "--only", "good_row"], package=PACKAGE) == 0
    assert "1 kernels compiled" in capsys.readouterr().out


def test_a_crash_of_the_compiler_is_one_failure_among_results_in_order():
    tasks = compile_report.list_tasks([90], "", PACKAGE)
    picked = [task for name in ("good_row_sum", "crash", "bad_signature") for task in tasks if task.name == name]
    results = list(compile_report.run_tasks(picked, jobs=2))
    assert [result.name for result in results] == ["good_row_sum", "crash", "bad_signature"]
    assert [bool(result.failures) for result in results] == [False, True, True]
    assert results[1].failures == ("does not compile: the compiler crashed",)


def test_bad_arguments_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--arch", "75"])
    assert "arch '75' is not one of 0, 80, 90, 100" in capsys.readouterr().err
    assert compile_report.main(["--only", "no_such_kernel"], package=PACKAGE) == 2
    assert "no kernel of tests.planted_kernels matches 'no_such_kernel'" in capsys.readouterr().err


def test_it_refuses_to_run_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_report", "--arch", "90"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "compile_report: TRITON_INTERPRET=1 is set, so nothing can be compiled; unset it"
    ]
