"""Which branches for CUDA a process has taken: modules are instrumented as they are imported.

A question is `x.is_cuda`, a comparison with "cuda" or "cpu", `torch.cuda.is_available()`, or a call of a function that
returns the answer to one. A branch for CUDA is an `if`, a conditional expression or a `while` whose condition holds a
question, or a name that an answer was given to in the same module. Branches, and questions outside of them, have to be
true once and false once; a call of `torch.cuda.*` has to be made. A site is named by file, function and source text,
not by its line.
"""

from __future__ import annotations

import ast
import builtins
import collections
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent.parent
TAKEN: dict[str, set[str]] = {}
"""By site: what has to happen there ("true", "false", "called") and has not yet."""

_HOOK = "__rehearsed__"
_DEVICES = ("cuda", "cpu")


def instrument(packages: Sequence[str]) -> None:
    """Instrument what is imported from now on of `packages`; what never is has taken none of its branches."""
    files = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    trees = {path: ast.parse(path.read_text()) for path in files}
    functions = answering(trees.values())
    trees = {path: rewritten(tree, _name_of(path), functions) for path, tree in trees.items()}
    setattr(builtins, _HOOK, _note)
    sys.meta_path.insert(0, _Finder(packages, functions, trees))


def answering(trees: Iterable[ast.Module]) -> frozenset[str]:
    """Names of the functions in these modules that return an answer about the device."""
    found: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(inner, ast.Return) and inner.value is not None and _is_truth(inner.value)
                for inner in ast.walk(node)
            ):
                found.add(node.name)
    return frozenset(found)


def not_taken() -> list[str]:
    """`file::function: source is never true`, one a line, of every instrumented module."""
    return [
        f"{site} is never {what}" for site, missing in sorted(TAKEN.items()) for what in sorted(missing, reverse=True)
    ]


def rewritten(tree: ast.Module, name: str, functions: frozenset[str]) -> ast.Module:
    """The module `name` with every site wrapped, and the sites added to TAKEN."""
    wrapped = _Wrap(name, _names(tree, functions), functions).visit(tree)
    return ast.fix_missing_locations(wrapped)


def _name_of(path: Path) -> str:
    return str(path.resolve().relative_to(ROOT))


def _note(value: Any, site: str, call: bool) -> Any:
    missing = TAKEN[site]
    if missing:
        missing.discard("called" if call else "true" if value else "false")
    return value


def _asks(node: ast.AST, names: frozenset[str], functions: frozenset[str]) -> bool:
    """Whether an expression holds a question for the device, or a name that carries an answer."""
    return any(_question(inner, functions) or _name(inner) in names for inner in ast.walk(node))


def _question(node: ast.AST, functions: frozenset[str]) -> bool:
    if isinstance(node, ast.Compare):
        return any(isinstance(x, ast.Constant) and x.value in _DEVICES for x in (node.left, *node.comparators))
    if isinstance(node, ast.Call):
        return _dotted(node.func) == "torch.cuda.is_available" or _name(node.func) in functions
    return isinstance(node, ast.Attribute) and node.attr == "is_cuda"


def _is_truth(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return any(map(_is_truth, node.values))
    if isinstance(node, ast.UnaryOp):
        return _is_truth(node.operand)
    return _question(node, frozenset())


def _names(tree: ast.Module, functions: frozenset[str]) -> frozenset[str]:
    """Names and attributes of a module that are given an answer, or something else for each answer."""
    names: frozenset[str] = frozenset()
    while True:
        found = set(names)
        for node in ast.walk(tree):
            value = getattr(node, "value", None)
            if (
                isinstance(node, (ast.Assign, ast.AnnAssign))
                and value is not None
                and _decides(value, names, functions)
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {name for target in targets for name in map(_name, ast.walk(target)) if name}
        found.discard("self")
        if found == names:
            return names
        names = frozenset(found)


def _decides(value: ast.expr, names: frozenset[str], functions: frozenset[str]) -> bool:
    """Whether the value is an answer, or one of two things by an answer; a call that is only given one is neither."""
    if isinstance(value, ast.IfExp):
        return _asks(value.test, names, functions)
    if isinstance(value, (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Attribute)):
        return _asks(value, names, functions)
    return _question(value, functions)


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


class _Wrap(ast.NodeTransformer):
    def __init__(self, module: str, names: frozenset[str], functions: frozenset[str]) -> None:
        self.names, self.functions, self.inside = names, functions, [module]
        self.branching = 0  # conditions of branches that this is inside
        self.met: collections.Counter[str] = collections.Counter()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._in(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._in(node)

    def visit_If(self, node: ast.If | ast.IfExp | ast.While) -> ast.AST:
        if not _asks(node.test, self.names, self.functions):
            return self.generic_visit(node)
        text = ast.unparse(node.test)
        self.branching += 1
        test = self._site(self.visit(node.test), text, call=False)
        self.branching -= 1
        node.test = ast.Constant(True)  # visited already
        self.generic_visit(node)
        node.test = test
        return node

    visit_IfExp = visit_While = visit_If

    def visit_Compare(self, node: ast.Compare | ast.Attribute) -> ast.AST:
        asks, text = not self.branching and _question(node, self.functions), ast.unparse(node)
        self.generic_visit(node)
        return self._site(node, text, call=False) if asks else node

    visit_Attribute = visit_Compare

    def visit_Call(self, node: ast.Call) -> ast.AST:
        dotted = _dotted(node.func)
        asks, text = not self.branching and _question(node, self.functions), ast.unparse(node)
        self.generic_visit(node)
        if asks:
            return self._site(node, text, call=False)
        if dotted.startswith("torch.cuda.") and dotted != "torch.cuda.is_available":
            return self._site(node, f"{dotted}()", call=True)
        return node

    def _in(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            return node  # a kernel: Triton reads its source
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()
        return node

    def _site(self, node: ast.expr, text: str, call: bool) -> ast.expr:
        module, *names = self.inside
        site = f"{module}::{'.'.join(names)}: {text}"
        self.met[site] += 1
        if self.met[site] > 1:
            site += f" ({self.met[site]})"
        TAKEN[site] = {"called"} if call else {"true", "false"}
        hook = ast.Name(_HOOK, ast.Load())
        return ast.copy_location(ast.Call(hook, [node, ast.Constant(site), ast.Constant(call)], []), node)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(
        self, packages: Sequence[str], functions: frozenset[str], trees: Mapping[Path, ast.Module]
    ) -> None:  # fmt: skip
        self.packages, self.functions, self.trees = packages, functions, trees

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name.split(".")[0] not in self.packages:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(name, spec.loader.path, self.functions, self.trees)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(
        self, name: str, path: str, functions: frozenset[str], trees: Mapping[Path, ast.Module]
    ) -> None:  # fmt: skip
        super().__init__(name, path)
        self.functions, self.trees = functions, trees

    def get_code(self, fullname: str) -> CodeType:  # never from a cached one, which is not instrumented
        path = Path(self.get_filename(fullname)).resolve()
        tree = self.trees.get(path) or rewritten(ast.parse(path.read_text()), _name_of(path), self.functions)
        return compile(tree, str(path), "exec", dont_inherit=True)
