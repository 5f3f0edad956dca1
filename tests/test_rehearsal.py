"""The CUDA-only Python on a pretended device, in a process of its own; and the instrument that counts its branches."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rehearsal import branches
from tests.rehearsal.device import COMPILER, torch_version

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER} to build the pretended device")
@pytest.mark.skipif(torch_version()["cuda"] is not None, reason="this torch has CUDA of its own, which it would take")
def test_everything_for_cuda_runs_on_a_pretended_device_and_every_branch_is_taken() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.rehearsal"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout


SOURCE = """
def runs(x):
    return x.is_cuda or False

class Loader:
    def __init__(self, device):
        self.on_cpu = device.type == "cpu"
        self.graph = one if self.on_cpu else other

def step(x, device):
    if runs(x):
        torch.cuda.synchronize()
    return x.sum()

def unrelated(x):
    return 1 if x > 2 else 3
"""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """SOURCE, instrumented and run; what it needs stands in it."""
    monkeypatch.setattr(branches, "TAKEN", {})
    names: dict[str, object] = {"__rehearsed__": branches._note, "one": 1, "other": 2}
    exec(compile(branches.rewritten(ast.parse(SOURCE), "file.py", frozenset({"runs"})), "file.py", "exec"), names)
    return names


def test_a_branch_that_is_not_taken_is_named_and_goes_when_it_is(counted: dict[str, object]) -> None:
    from types import SimpleNamespace as Some

    def step(on_gpu: bool) -> None:
        counted["step"](Some(is_cuda=on_gpu, sum=lambda: 0), None)  # type: ignore[operator]

    asked = {line for line in branches.not_taken() if "::step" in line}
    assert asked == {
        "file.py::step: runs(x) is never true",
        "file.py::step: runs(x) is never false",
        "file.py::step: torch.cuda.synchronize() is never called",
    }
    step(False)
    assert "file.py::step: runs(x) is never false" not in branches.not_taken()
    counted["torch"] = Some(cuda=Some(synchronize=lambda: None))
    step(True)
    assert not [line for line in branches.not_taken() if "::step" in line]


def test_names_carry_an_answer_and_other_conditions_do_not_count(counted: dict[str, object]) -> None:
    from types import SimpleNamespace as Some

    assert {line for line in branches.not_taken() if "Loader" in line and "true" in line} == {
        "file.py::Loader.__init__: device.type == 'cpu' is never true",
        "file.py::Loader.__init__: self.on_cpu is never true",
    }
    for kind in ("cpu", "cuda"):
        counted["Loader"](Some(type=kind))  # type: ignore[operator]
    assert not [line for line in branches.not_taken() if "Loader" in line or "unrelated" in line]
