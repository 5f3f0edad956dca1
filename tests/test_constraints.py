"""constraints.txt resolves against the public package index, whatever index this machine is set up to use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))} | {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_CACHE_DIR": "1",
}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The index's newest uv: it resolves in seconds, for every Python, what takes pip a minute each."""
    folder = tmp_path_factory.mktemp("uv")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10"]
    done = subprocess.run([*install, "--target", folder, "uv"], env=PUBLIC, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no public package index is reached from here: {done.stderr.strip().splitlines()[-1]}")
    return [folder / "bin" / "uv", "--no-config", "--cache-dir", folder / "cache"]


@pytest.mark.slow
def test_the_tested_versions_resolve_without_local_configuration(uv: list[str | Path]) -> None:
    """Once for every Python and platform that the package is for: uv calls that universal.

    setup.py is asked in this environment, as the Makefile does: for one of its own uv would look for a Python.
    """
    command = [
        *uv, "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
        "--no-build-isolation", "--python", sys.executable,
        "--extra", "test", "--extra", "dev", "--constraints", "constraints.txt", "setup.py",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=PUBLIC, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    for name in ("torch", "triton", "nvidia-dali-cuda130", "pytest"):
        assert f"{name}=={pins[name]}" in done.stdout.split()
