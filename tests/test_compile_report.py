"""The compile report passes what is right and catches each planted fault."""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import JITFunction

from benchmarks import compile_report, workshop
from deitfast import kernels
from deitfast.kernels.attention_kernels import (
    attention_bwd_short_kernel,
    attention_bwd_transposed_kernel,
    attention_fwd_short_kernel,
)
from deitfast.kernels.common import INTERPRETED, Launch, Recorded, launch, record
from deitfast.kernels.layernorm_linear import layernorm_linear_kernel
from deitfast.kernels.row_sums import row_sums
from tests.planted_kernels import planted

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing can be compiled under TRITON_INTERPRET=1")

PLANTED = "tests.planted_kernels.planted"


def compile_launch(launch: Callable[[], None], arch: int) -> compile_report.Result:
    with FakeTensorMode(), record(arch) as launches:
        launch()
    (case,) = compile_report.cases_of(launches, arch)
    return compile_report.compile_case(case, arch)


def compile_matmul(name: str, arch: int) -> compile_report.Result:
    return compile_launch(lambda: planted.matmul(planted.MATMULS[name]), arch)


@pytest.mark.parametrize(("arch", "kind"), [(0, "HMMA"), (80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_good_matrix_kernel_passes_and_names_its_instruction(arch, kind):
    result = compile_matmul("good", arch)
    assert result.failures == ()
    assert result.tensor_core.keys() == {kind}
    assert result.threads == 128
    assert 16 <= result.registers <= 255
    # Two or more stages of two (64, 64) bf16 tiles, less than eight.
    assert 2 * 2 * 64 * 64 <= result.shared <= 8 * 2 * 64 * 64 * 2
    assert result.ctas_per_sm >= 2


def test_a_kernel_without_matmul_needs_no_tensor_core():
    result = compile_launch(planted.row_sum, 90)
    assert result.failures == ()
    assert result.tensor_core == {}


@pytest.mark.parametrize(
    ("name", "arch", "failure"),
    [
        ("spills", 90, "spills"),
        ("much shared memory", 0, "exceeds 99 KB"),
        ("much shared memory", 90, "exceeds 227 KB"),
        ("no wgmma", 90, "matrix kernel without [HQ]GMMA on sm_90"),
        ("serialised", 90, "wgmma serialised (C75"),
    ],
)
def test_each_fault_is_named(name, arch, failure):
    result = compile_matmul(name, arch)
    assert any(failure in found for found in result.failures), result


def test_a_block_of_64_bit_divisions_is_named():
    assert compile_launch(planted.division, 90).failures == ("divides blocks of 64-bit integers 1 times",)


def test_programs_that_do_not_all_fit_the_chip_at_once_are_named():
    """Of one warp and few registers an H100 holds 32 on each of its 132 multiprocessors."""
    fits, too_many = (compile_launch(lambda n=n: planted.row_sum(programs=n), 90) for n in (132 * 32, 132 * 32 + 1))
    assert fits.ctas_per_sm == 32
    assert fits.failures == ()
    assert too_many.failures == ("4225 programs share its work out, of which 4224 fit the chip at once",)


def test_the_verdict_is_the_same_from_tritons_cache():
    assert compile_matmul("serialised", 90).failures == compile_matmul("serialised", 90).failures


def test_an_argument_that_is_missing_is_an_error():
    """As it is when the kernel is launched."""
    with FakeTensorMode(), record(90) as launches:
        launch(planted.row_sum_kernel, (1,), Launch({"ROWS": 1}, 1, 1), x_ptr=torch.empty(1), out_ptr=torch.empty(1))
    with pytest.raises(TypeError, match="COLUMNS"):
        compile_report.cases_of(launches, 90)


# What is recorded ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_a_case_is_what_tritons_jit_would_compile(arch):
    """Sizes of 1 are constants, sizes and pointers that are multiples of 16 are known to be, None is a constant."""
    with FakeTensorMode(), record(arch) as launches:
        wide = torch.empty(197, 33, dtype=torch.bfloat16)
        row_sums(wide, torch.float32, torch.empty(197), out=torch.empty(65)[32:])
        row_sums(wide[:, 1:2], torch.bfloat16)
    weighted, narrow = (case.traits() for case in compile_report.cases_of(launches, arch))
    assert weighted["x"] == "bf16"
    assert weighted["weights"] == "fp32"
    assert weighted["out"] == "fp32"
    assert (weighted["stride_x"], weighted["R"], weighted["C"]) == ("i32", "i32", "i32")
    assert narrow["x"] == "bf16(unaligned)"
    assert narrow["weights"] == ""
    assert narrow["C"] == "1"
    assert all(case["num_warps"] == "4" for case in (weighted, narrow))
    with FakeTensorMode(), record(arch) as launches:
        row_sums(torch.empty(16, 32), torch.float32)
    (case,) = compile_report.cases_of(launches, arch)
    assert [case.traits()[name] for name in ("stride_x", "R", "C")] == ["i32(16n)"] * 3


@functools.cache
def recorded(arch: int) -> list[Recorded]:
    with FakeTensorMode(), record(arch) as launches:
        workshop.uses()
    return launches


def modules() -> list[ModuleType]:
    names = (module.name for module in pkgutil.iter_modules(kernels.__path__, "deitfast.kernels."))
    return [importlib.import_module(name) for name in names]


def launches_in(value: object) -> Iterator[Launch]:
    if isinstance(value, Launch):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from launches_in(inner)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_every_kernel_and_every_launch_table_entry_is_recorded(arch):
    launches = recorded(arch)
    named = {value for module in modules() for name, value in vars(module).items() if name.endswith("_kernel")}
    defined = {value for value in named if isinstance(value, JITFunction)}
    not_here = {0: {attention_bwd_short_kernel, layernorm_linear_kernel}, 80: {attention_bwd_short_kernel}}
    not_here = {chip: not_here.get(chip, set()) | {attention_bwd_transposed_kernel} for chip in (0, 80, 100)}
    assert {launch.kernel for launch in launches} == defined - not_here.get(arch, set())
    used = {id(launch.entry) for launch in launches}
    # The whole-sequence forward adds the numbers of keys, which follow from that of tokens, to a copy of its entry.
    short = [launch.entry for launch in launches if launch.kernel is attention_fwd_short_kernel]
    keyless = [replace(x, tiles={"QUERIES": x.tiles["QUERIES"], "KEYS": 0, "TMA": x.tiles["TMA"]}) for x in short]
    for module in modules():
        for name, value in vars(module).items():
            if name.isupper() and not name.startswith(("_", "INTERPRETER")):
                table = value.get(arch, {}) if name == "LAUNCHES" else value
                missing = [x for x in launches_in(table) if id(x) not in used and x not in keyless]
                assert not missing, f"{module.__name__}.{name}"


@functools.cache
def cases(arch: int) -> list[compile_report.Case]:
    return compile_report.cases_of(recorded(arch), arch)


def test_names_tell_the_cases_apart():
    for arch in (80, 90):
        names = [case.name for case in cases(arch)]
        assert len(set(names)) == len(names)


def test_sizes_that_training_and_evaluation_meet_are_both_compiled():
    of_linear = [case.traits() for case in cases(90) if case.name.startswith("linear ")]
    plain = {case["M"] for case in of_linear if case["b"] == "bf16[256,64]" and not case["residual"]}
    assert plain == {"i32", "i32(16n)"}


# The command ---------------------------------------------------------------------------------------------------------


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
    assert compile_report.main(["--arch", "90", "--only", "no*_a", "--json", str(path)], module=PLANTED) == 1
    message = "FAILED sm_90 not_a: does not compile: ValueError: Shape element 0 must be a power of 2"
    assert message in capsys.readouterr().out
    (result,) = json.loads(path.read_text())
    assert result["name"] == "not_a"
    assert result["failures"]
    assert compile_report.main(["--arch", "90", "--only", "row_s"], module=PLANTED) == 0
    assert "1 kernels compiled" in capsys.readouterr().out


def test_a_crash_of_the_compiler_is_one_failure_among_results_in_order():
    tasks = compile_report.list_tasks([90], "", PLANTED)
    picked = [task for name in ("row_sum", "crash", "not_a") for task in tasks if task.name == name]
    results = list(compile_report.run_tasks(picked, jobs=2))
    assert [result.name for result in results] == ["row_sum", "crash", "not_a"]
    assert [bool(result.failures) for result in results] == [False, True, True]
    assert results[1].failures == ("does not compile: the compiler crashed",)


def test_bad_arguments_are_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--arch", "75"])
    assert "arch '75' is not one of 0, 80, 90, 100" in capsys.readouterr().err
    assert compile_report.main(["--only", "no_such_kernel"], module=PLANTED) == 2
    assert "no kernel of tests.planted_kernels.planted matches 'no_such_kernel'" in capsys.readouterr().err


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
