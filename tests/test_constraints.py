"""constraints.txt resolves against the public package index, whatever index this machine is set up to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
PUBLIC = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))} | {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_CACHE_DIR": "1",
}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The index's newest uv: it resolves in seconds, for any Python, what takes pip a minute each."""
    folder = tmp_path_factory.mktemp("uv")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10"]
    done = subprocess.run([*install, "--target", folder, "uv"], env=PUBLIC, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no public package index is reached from here: {done.stderr.strip().splitlines()[-1]}")
    return [folder / "bin" / "uv", "--no-config", "--cache-dir", folder / "cache"]


@pytest.fixture(scope="module")
def resolving(uv: list[str | Path]) -> dict[str, subprocess.Popen[str]]:
    """A resolution by version of Python, all under way at once: what they do is wait for the index.

    setup.py is asked in this environment, as the Makefile does: for one of its own uv would look for each Python.
    """
    command = [
        *uv, "pip", "compile", "--quiet", "--python-platform", "x86_64-manylinux_2_28",
        "--no-build-isolation", "--python", sys.executable, "--extra", "test", "--extra", "dev",
        "--constraints", "constraints.txt", "setup.py", "--python-version",
    ]  # fmt: skip
    pipe = subprocess.PIPE
    return {
        python: subprocess.Popen([*command, python], cwd=ROOT, env=PUBLIC, stdout=pipe, stderr=pipe, text=True)
        for python in PYTHONS
    }


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_tested_versions_resolve_without_local_configuration(
    resolving: dict[str, subprocess.Popen[str]], python: str
) -> None:
    out, problem = resolving[python].communicate(timeout=280)
    assert resolving[python].returncode == 0, problem
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for name in ("torch", "triton", "nvidia-dali-cuda130", "pytest"):
        assert f"{name}=={pins[name]}" in out.split()
