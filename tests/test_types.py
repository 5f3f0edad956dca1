"""What a type checker sees of the package: wrong calls to kernels and recipes are found, because nothing is `Any`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLANTED = {
    'kernels.attention("qkv", heads=3)': 'Argument 1 to "attention" has incompatible type "str"; expected "Tensor"',
    "kernels.layernorm_mlp(x, x)": "Missing positional arguments",
    "kernels.linear_residual(x, x, x, residual=1)": 'Argument "residual" to "linear_residual" has incompatible type',
    "replace(deit_base.RECIPE, lrr=3)": 'Unexpected keyword argument "lrr"',
    "replace(deit_tiny_distilled.RECIPE, lr='3')": 'Argument "lr" to "replace" of "Recipe" has incompatible type',
}
HEADER = """\
from dataclasses import replace
from torch import Tensor
from deitfast import kernels
from deitfast.recipes import deit_base, deit_tiny_distilled
x = Tensor()
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy, with this repository's settings and its cache, says of every planted call."""
    file = tmp_path_factory.mktemp("types") / "planted.py"
    file.write_text(HEADER + "".join(f"{call}\n" for call in PLANTED))
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("call", PLANTED)
def test_mypy_finds_a_planted_wrong_call(complaints: str, call: str) -> None:
    line = HEADER.count("\n") + 1 + list(PLANTED).index(call)
    found = [text for text in complaints.splitlines() if f"planted.py:{line}: error: " in text]
    assert any(PLANTED[call] in text for text in found), complaints


def test_mypy_finds_nothing_else(complaints: str) -> None:
    first = HEADER.count("\n") + 1
    lines = {int(text.split(":")[1]) for text in complaints.splitlines() if "planted.py:" in text}
    assert lines == set(range(first, first + len(PLANTED)))
