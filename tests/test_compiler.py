"""A machine on which Triton could not build its launcher is told so in words, before the first kernel."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks.measuring.command import ready
from deitfast import distributed
from deitfast.compiler import check_compiler
from deitfast.errors import DeitfastError
from deitfast.use import inference


@pytest.fixture(autouse=True)
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with gcc and Python.h, and an empty cache of Triton's."""
    for name in ("bin/gcc", "include/Python.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})


def test_a_machine_with_compiler_and_headers_passes() -> None:
    check_compiler()


def test_a_missing_compiler_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin" / "gcc").unlink()
    with pytest.raises(DeitfastError, match=r"no C compiler\. Install gcc"):
        check_compiler()
    monkeypatch.setenv("CC", "nvhpc")
    with pytest.raises(DeitfastError, match="CC names nvhpc, which is no program here"):
        check_compiler()
    monkeypatch.setenv("CC", sys.executable)
    check_compiler()


def test_clang_will_do(tmp_path: Path) -> None:
    (tmp_path / "bin" / "gcc").rename(tmp_path / "bin" / "clang")
    check_compiler()


def test_missing_headers_are_told_with_the_package_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "include" / "Python.h").unlink()
    with pytest.raises(DeitfastError, match=rf"no Python.h in {tmp_path}.*python3\.\d+-dev"):
        check_compiler()


def test_a_module_that_triton_has_built_before_needs_no_compiler(tmp_path: Path, monkeypatch) -> None:
    from triton.runtime import driver

    shutil.rmtree(tmp_path / "bin")
    monkeypatch.setattr(driver, "_active", object())
    check_compiler()


def test_a_run_a_prediction_and_a_benchmark_on_a_gpu_begin_with_it(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "bin" / "gcc").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for begin in (distributed.start, inference.pick_device):
        with pytest.raises(DeitfastError, match="no C compiler"):
            begin("cuda")
    assert not ready("micro", "cuda")
    assert "micro: Triton builds a small C module before its first kernel, and this machine" in capsys.readouterr().err
