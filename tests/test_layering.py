"""Who may import whom, read from the source with ast: floors, no circles, DALI and the kernels in their places."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    p for folder in ("deitfast", "kernels", "recipes", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")
)
FLOORS = ("ground", "kernels", "verification", "data", "model", "engine", "use", "training", "cli", "package")
"""From the lowest up: a module imports from its own floor and those below. `package` is deitfast/__init__.py, whose
public names are imported on first use; `ground` are the other files that lie in deitfast/ itself."""

DOORS = frozenset(f"deitfast.{name}" for name in ("convert", "export", "images", "predict", "weights"))
"""Old paths of modules that moved into a room: imports and `__all__`, and the package itself never uses them."""

# The places where the package meets its kernels: the block, the optimiser, the loss, the input, their verification.
MEET_KERNELS = ("deitfast/model/fused.py", "deitfast/engine/flat.py", "deitfast/engine/losses.py",
                "deitfast/data/batch.py", "deitfast/data/augmentation.py", "deitfast/verification/check.py",
                "deitfast/verification/verify.py", "deitfast/verification/verdict.py",
                "deitfast/verification/case.py", "deitfast/verification/choice.py",
                "deitfast/verification/warm.py")  # fmt: skip


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Modules that a file imports; by default also inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & package().keys()  # `from package import module` needs no more of the package
            if names - package().keys():
                yield node.module


@cache
def package() -> dict[str, Path]:
    """Modules of the package, the kernels among them, by dotted name."""
    files = {
        "deitfast/kernels" + str(p).removeprefix(str(ROOT / "kernels")): p for p in (ROOT / "kernels").glob("*.py")
    }
    files |= {str(p.relative_to(ROOT)): p for p in (ROOT / "deitfast").rglob("*.py")}
    return {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for name, p in files.items()}


@cache
def graph() -> dict[str, set[str]]:
    """Every module of the package with the modules of the package that it imports, wherever in the file."""
    return {name: {m for m in imports(path) if m in package() and m != name} for name, path in package().items()}


def floor(module: str) -> int:
    parts = module.split(".")
    if module in ("deitfast", "deitfast.__main__", *DOORS):
        return FLOORS.index("package")
    return FLOORS.index(parts[1] if parts[1] in FLOORS else "ground")


def components(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            cut = stack.index(node)
            component = set(stack[cut:])
            del stack[cut:]
            if len(component) > 1:
                found.append(component)

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert components({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert not components({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_imports_run_in_a_circle() -> None:
    assert len(graph()) > 80
    assert components(graph()) == []


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_only_opens(door: str) -> None:
    docstring, *rest = ast.parse(package()[door].read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom) for node in rest[:-1])
    assert isinstance(rest[-1], ast.Assign)
    module = importlib.import_module(door)
    assert [name for name in vars(module) if not name.startswith("__")] == sorted(module.__all__)
    assert not [a for a, targets in graph().items() if door in targets], "use the module itself"


def test_imports_run_down_the_floors() -> None:
    up = [f"{a} -> {b}" for a, targets in graph().items() for b in targets if floor(b) > floor(a)]
    assert not up
    rooms = {p.name for p in (ROOT / "deitfast").iterdir() if (p / "__init__.py").is_file()}
    assert rooms - {"recipes"} == set(FLOORS) - {"ground", "package"}


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
        assert ours <= {"deitfast"}, "recipes use the public names"


@pytest.mark.parametrize("name", ["cli.main", "cli.data", "cli.model", "model.zoo", "training.launch", "recipe"])
def test_listing_and_help_need_no_torch(name: str) -> None:
    """Nothing heavy on the way to a command's --help, whichever module imports which."""
    seen: set[str] = set()
    waiting = ["deitfast", f"deitfast.{name}"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for found in imports(package()[module], top_level_only=True):
            assert found.split(".")[0] not in ("torch", "triton", "numpy"), f"{module} imports {found}"
            for part in (found, found.rpartition(".")[0]):
                if part in package() and part not in seen:
                    waiting.append(part)
