"""Who may import whom, read from the source with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    p for folder in ("deitfast", "kernels", "recipes", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")
)
# The places where the package meets its kernels: the block, the optimiser, the loss, the input.
MEET_KERNELS = ("deitfast/fused.py", "deitfast/flat.py", "deitfast/losses.py", "deitfast/data/augment.py",
                "deitfast/data/policy.py")  # fmt: skip


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_respect_the_layers(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = list(imports(path))
    assert not [m for m in found if m.split(".")[0] == "kernels"], "import deitfast.kernels, not kernels"
    if name.startswith(("tests", "benchmarks")):
        return
    assert not [m for m in found if m.split(".")[0] in ("tests", "benchmarks", "timm", "pytest")]
    if name.startswith("kernels"):
        outside = [
            m for m in found if m.split(".")[0] in ("deitfast", "recipes") and not m.startswith("deitfast.kernels")
        ]
        assert not outside, "kernels know only torch and triton"
    elif name not in MEET_KERNELS:
        assert not [m for m in found if m.startswith("deitfast.kernels")], f"only {MEET_KERNELS} import the kernels"
    if not name.startswith("deitfast/data"):
        assert not [m for m in found if m.startswith("nvidia")], "only the data package knows DALI"
    assert not [m for m in imports(path, top_level_only=True) if m.startswith("nvidia")], (
        "DALI is imported in functions"
    )
    if name.startswith("recipes"):
        ours = {m for m in found if m.startswith("deitfast") and not m.startswith("deitfast.recipes.")}
        assert ours <= {"deitfast.recipe"}


@pytest.mark.parametrize("name", ["cli", "cli_data", "cli_use", "zoo", "errors", "guard", "recipe", "__init__"])
def test_listing_and_help_need_no_torch(name: str) -> None:
    modules = list(imports(ROOT / "deitfast" / f"{name}.py", top_level_only=True))
    assert not [m for m in modules if m.split(".")[0] in ("torch", "triton", "numpy")]
    ours = {f"deitfast.{name}" for name in ("cli_data", "cli_use", "errors", "guard", "recipe", "zoo")}
    assert {m for m in modules if m.startswith("deitfast")} <= ours
