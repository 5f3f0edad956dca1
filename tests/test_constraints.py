"""constraints.txt resolves against the public package index, whatever index this machine is set up to use."""

from __future__ import annotations

import os
import shutil
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
def pip(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The index's newest pip, which asks for the metadata of wheels; older ones download all their gigabytes."""
    folder = tmp_path_factory.mktemp("pip")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "0", "--timeout", "10"]
    done = subprocess.run([*install, "--target", folder, "pip"], env=PUBLIC, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no public package index is reached from here: {done.stderr.strip().splitlines()[-1]}")
    return [sys.executable, str(folder / "pip")]


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_tested_versions_resolve_without_local_configuration(pip: list[str], python: str, tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "deitfast").mkdir()
    shutil.copy(ROOT / "deitfast" / "__init__.py", tmp_path / "deitfast")
    command = [
        *pip, "install", "--dry-run", "--use-feature=fast-deps", "--ignore-installed", "--target", "unused",
        "--python-version", python, "--only-binary", ":all:", "-c", "constraints.txt", ".[test,dev]",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=PUBLIC, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    chosen = done.stdout.split("Would install ")[1].split()
    for name in ("torch", "triton", "nvidia-dali-cuda130", "pytest"):
        assert f"{name}-{pins[name]}" in chosen
