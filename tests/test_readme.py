"""docs/tree.md is the tree: every module is in it with a phrase, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = sorted(
    f"deitfast/{p.parent.name}" for p in (ROOT / "deitfast").glob("*/__init__.py") if not p.parent.is_symlink()
)
MEASURED = sorted(f"benchmarks/{p.parent.name}" for p in (ROOT / "benchmarks").glob("*/__init__.py"))
FOLDERS = ("deitfast", *ROOMS, "kernels", "benchmarks", *MEASURED, "recipes")


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
