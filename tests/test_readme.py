"""README and docs: every link leads somewhere, every command parses, every example runs, every file is in the tree."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import deitfast
from deitfast.cli.main import command_parser
from deitfast.cli.recipes import load_recipe
from deitfast.training.launch import parse_flags

ROOT = Path(__file__).parent.parent
ROOMS = sorted(
    f"deitfast/{p.parent.name}" for p in (ROOT / "deitfast").glob("*/__init__.py") if not p.parent.is_symlink()
)
MEASURED = sorted(f"benchmarks/{p.parent.name}" for p in (ROOT / "benchmarks").glob("*/__init__.py"))
FOLDERS = ("deitfast", *ROOMS, "kernels", "benchmarks", *MEASURED, "recipes")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LONGEST_README = 130


def test_the_tree_names_every_module_once_with_a_phrase() -> None:
    tree = (ROOT / "docs/tree.md").read_text().split("```")[1]
    listed: list[str] = []
    folder = ""
    for line in tree.strip().splitlines():
        match = re.match(r"(\s*)(\S+)\s+(\S.*)?$", line + " ")
        assert match, line
        indent, name, phrase = match.groups()
        assert phrase, f"no phrase: {line}"
        if name.endswith("/"):
            parent = "" if not indent else folder.split("/")[0] + "/"
            folder = (parent + name).rstrip("/")
        elif indent and name.endswith(".py"):
            listed.append(f"{folder if len(indent) > 2 else folder.split('/')[0]}/{name}")
    actual = [
        str(path.relative_to(ROOT))
        for place in FOLDERS
        for path in (ROOT / place).glob("*.py")
        if path.name != "__init__.py" or place == "deitfast"
    ]
    assert sorted(listed) == sorted(actual)


def test_the_readme_is_a_front_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= LONGEST_README
    first_screen = "\n".join(lines[:30])
    for promised in ("badge", "docs/step.svg", "DeiT-Ti", "72.2 %", "images/s", "Linux", "Python 3.11"):
        assert promised in first_screen or promised in "\n".join(lines[:40]), promised


# Links ---------------------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        path, _, anchor = target.partition("#")
        if target.startswith("http"):
            continue
        where = (page.parent / path).resolve() if path else page
        if not where.exists() or (anchor and where.suffix == ".md" and anchor not in anchors(where)):
            broken.append(target)
    assert not broken


# Commands ------------------------------------------------------------------------------------------------------------


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, code) of every block of a page."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every line of a page's shell blocks, continuations joined, comments dropped."""
    for language, code in blocks(page.read_text()):
        if not language:
            for line in code.replace("\\\n", " ").splitlines():
                if line.startswith(("deitfast ", "torchrun ", "python -m ")):
                    yield shlex.split(line, comments=True)


def check(words: list[str]) -> None:
    """Raise for a command of ours that would be refused for its flags."""
    if words[0] == "torchrun":
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        parse_flags(load_recipe(Path(words[at]).stem), words[at + 1 :])
    elif words[0] == "deitfast":
        known, unknown = command_parser().parse_known_args(words[1:])
        if known.command == "train":
            parse_flags(load_recipe(known.recipe), [w for w in unknown if w != "--help"])
        elif unknown:
            assert known.command == "data", f"unknown: {unknown}"
            assert known.data_command == "show", f"unknown: {unknown}"
            parse_flags(load_recipe("deit_base"), unknown)
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / f"{words[2].replace('.', '/')}.py").exists() or (ROOT / words[2].replace(".", "/")).is_dir()


@pytest.mark.parametrize("name", NAMES)
def test_commands_have_the_flags_that_are_given(name: str) -> None:
    for words in commands(ROOT / name):
        check(words)


def test_a_command_with_a_wrong_flag_is_found() -> None:
    with pytest.raises(deitfast.DeitfastError, match="--bacth"):
        check(["deitfast", "train", "deit_base", "--bacth", "64"])
    with pytest.raises(AssertionError):
        check(["deitfast", "models", "--jsn"])


# Examples ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_python_blocks_use_names_that_exist(name: str) -> None:
    for language, code in blocks((ROOT / name).read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "deitfast":
                    assert hasattr(deitfast, node.attr), node.attr


def test_the_readmes_python_runs(tmp_path: Path, timm) -> None:
    code = [code for language, code in blocks((ROOT / "README.md").read_text()) if language == "python"]
    assert len(code) == 2
    for i, text in enumerate(code):
        script = tmp_path / f"block{i}.py"
        script.write_text(text)
        ran = runpy.run_path(str(script))
        if "report" in ran:
            assert len(ran["report"].replaced) == 12
        else:
            assert ran["out"].shape == (2, 197, 384)
