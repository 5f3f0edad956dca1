"""What is built and installed from a checkout: a wheel for strangers, a source distribution whose tests run."""

from __future__ import annotations

import email
import email.message
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import deitfast
from tests.test_readme import blocks

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", "runs", ".*_cache", ".hypothesis", ".wheels"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that succeeds."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second checkout, with the links that this one has."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("second") / "repo", symlinks=True, ignore=NOT_COPIED))


@pytest.fixture(scope="module")
def built(checkout: Path) -> Path:
    """A folder with the source distribution of a checkout and the wheel made from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout / "dist", cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


def test_a_second_checkout_takes_kernels_and_recipes_from_itself(checkout: Path) -> None:
    for module, file in (("kernels.gemm", "kernels/gemm.py"), ("recipes.deit_base", "recipes/deit_base.py")):
        code = f"import deitfast.{module} as module; print(module.__file__)"
        assert Path(run(sys.executable, "-c", code, cwd=checkout).strip()).resolve() == checkout / file


def test_the_wheel_holds_the_package_with_kernels_recipes_and_data_once(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = Counter(n for n in archive.namelist() if ".dist-info/" not in n)
    expected = {f"deitfast/{name}" for name in modules(checkout / "deitfast") if "digits" not in name}
    for linked in ("kernels", "recipes"):
        expected |= {f"deitfast/{linked}/{name}" for name in modules(checkout / linked)}
    assert {n for n in held if n.endswith(".py")} == expected
    assert set(held.values()) == {1}
    data = ("py.typed", "data/digits/train.tar", "data/digits/val.tar", "data/digits/LICENSE.txt")
    assert {f"deitfast/{name}" for name in data} <= set(held)


def test_the_metadata_says_what_a_stranger_asks(metadata: email.message.Message) -> None:
    assert metadata["Version"] == deitfast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert {url.split(",")[0] for url in metadata.get_all("Project-URL")} >= {"Source", "Issues"}
    text = metadata.get_payload()
    assert text.startswith("# deitfast")
    targets = re.findall(r'(?:\]\(|src="|srcset="|href=")([^)" #]+)', text)
    assert targets
    assert not [path for path in targets if (ROOT / path).exists()]  # relative links lead nowhere on a package index


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_what_exists_for_linux_alone_is_asked_for_on_linux_alone(metadata, system: str) -> None:
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    asked = {r.name for r in requirements if not r.marker or r.marker.evaluate({"sys_platform": system, "extra": ""})}
    assert ({"triton", "nvidia-dali-cuda130"} <= asked) == (system == "linux")
    assert "torch" in asked
    assert not [name for name in asked if "cuda120" in name]
    extra = {"sys_platform": system, "extra": "cuda12"}
    assert any(r.name == "nvidia-dali-cuda120" and r.marker and r.marker.evaluate(extra) for r in requirements) == (
        system == "linux"
    )


def test_both_distributions_pass_the_index_s_check(built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def test_the_source_distribution_holds_a_whole_checkout_whose_tests_run(built: Path, checkout: Path, tmp_path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for link in ("kernels", "recipes"):
        assert os.readlink(unpacked / "deitfast" / link) == f"../{link}"
    assert modules(checkout) <= modules(unpacked)
    for name in ("Makefile", "constraints.txt", ".ci/run", "CONTRIBUTING.md", "docs/attention.jpg"):
        assert (unpacked / name).read_bytes() == (checkout / name).read_bytes()
    code = "import deitfast; print(deitfast.__file__)"
    assert str(unpacked) in run(sys.executable, "-c", code, cwd=unpacked)
    some = (
        "test_layering.py::test_imports_run_down_the_floors",
        "test_readme.py::test_the_tree_names_every_module_once_with_a_phrase",
    )
    run(sys.executable, "-m", "pytest", *(f"tests/{test}" for test in some), cwd=unpacked)


SCRIPT = """\
from dataclasses import replace
import deitfast
from deitfast.recipes.deit_digits import RECIPE
result = deitfast.train(replace(RECIPE, epochs=1, warmup_epochs=0, workers=1, batch=128, image_size=8))
print(f"top-1 {result.raw.top1:.2f} % on {result.raw.images} images")
"""


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, over the packages that are present, without this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    packages = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "present.pth").write_text("\n".join(packages))
    assert str(site) in run(python, "-c", "import deitfast; print(deitfast.__file__)", cwd=folder)
    return folder / "bin"


@pytest.mark.slow
def test_the_readmes_quick_start_does_what_it_says_from_the_wheel_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    """From `deitfast doctor` on, as printed, but the demo takes an epoch of small images."""
    quick = next(code for _, code in blocks((ROOT / "README.md").read_text()) if "git clone" in code)
    lines = [line.split("#")[0].split() for line in quick.splitlines() if line.startswith("deitfast")]
    assert [line[1] for line in lines] == ["doctor", "train", "train", "test"]
    doctor, smoke, demo, test = ([installed / program, *words] for program, *words in lines)
    run(*doctor, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "smoke test passed: deit_base_patch16_224" in run(*smoke, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert not list(tmp_path.iterdir())
    short = ("--epochs", "1", "--warmup-epochs", "0", "--image-size", "8", "--batch", "128")
    run(*demo, *short, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "on 360 images" in run(*test, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert "deit_tiny_patch16_224" in run(installed / "deitfast", "models", cwd=tmp_path)


@pytest.mark.slow
def test_five_lines_of_a_strangers_python_train_and_are_type_checked(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_digits.py"
    script.write_text(SCRIPT)
    assert "% on 360 images" in run(installed / "python", script, cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"train_digits.py", "runs"}
    planted = "reveal_type(result)\nreveal_type(deitfast.create_model)\ndeitfast.train(RECIPE, lrr=3)\n"
    script.write_text(SCRIPT + planted)
    cache = tmp_path / "cache"
    if (ROOT / ".mypy_cache").is_dir():  # what is known of torch already: to read it is most of the time
        shutil.copytree(ROOT / ".mypy_cache", cache)
    mypy = [installed / "python", "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", cache]
    checked = subprocess.run([*mypy, script], cwd=tmp_path, capture_output=True, text=True, timeout=280).stdout
    assert 'Revealed type is "deitfast.training.evaluation.Result"' in checked
    assert "deitfast.model.deit.DeiT" in checked
    assert 'Unexpected keyword argument "lrr" for "train"' in checked
    assert "Found 1 error in 1 file" in checked
