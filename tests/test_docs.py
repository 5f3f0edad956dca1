"""The written pages are up to date; every public name is documented, with its parameters."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import deitfast

ROOT = Path(__file__).parent.parent
PAGES: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "pages.py"))
PUBLIC: list[tuple[str, Any]] = PAGES["public_names"]()


def test_pages_that_repeat_the_code_are_up_to_date() -> None:
    stale = [path.name for path, text in PAGES["pages"]().items() if path.read_text() != text]
    assert not stale, "run python docs/pages.py"


@pytest.mark.parametrize(("name", "value"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_every_public_name_is_documented(name: str, value: Any) -> None:
    own = (vars(value).get("__doc__") if isinstance(value, type) else value.__doc__) or ""
    assert own.strip(), "no docstring"
    told = own
    if isinstance(value, type):
        assert not own.startswith(f"{value.__name__}("), "a dataclass's generated docstring"
        for member, what in PAGES["members"](value):
            described = what.fget if isinstance(what, property) else what
            assert inspect.getdoc(described), f"{member} has no docstring"
        if dataclasses.is_dataclass(value):
            documented = {f.name for f in dataclasses.fields(value) if f.metadata.get("help")}
            shown = [f.name for f in dataclasses.fields(value) if not f.name.startswith("_")]
            missing = [name for name in shown if name not in told and name not in documented]
            assert not missing, f"fields {missing} are not documented"
        return
    missing = [p for p in inspect.signature(value).parameters if not re.search(rf"\b{p}\b", told)]
    assert not missing, f"parameters {missing} are not documented"


@pytest.mark.parametrize("name", list(deitfast.kernels.__all__))
def test_every_kernel_states_shapes_dtypes_and_errors(name: str) -> None:
    told = getattr(deitfast.kernels, name).__doc__
    assert re.search(r"\(.*\b[A-Z]\b.*\)", told), "no shape"
    assert re.search(r"bf16|bfloat16|float32|uint8", told), "no dtype"
    assert "Raises" in told


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {deitfast.__version__}\n" in text


def test_the_site_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert sorted(re.findall(r"[\w/]+\.md", text.split("nav:")[1])) == sorted(
        p.name for p in (ROOT / "docs").glob("*.md")
    )


def test_a_docstring_becomes_a_page() -> None:
    docstring = """Out of x and *rates <k> of `<m>`.

    y = x * 2      z = <x>

image, size: pixels
    and more. ratio: in `[0, 1]`.
Raises OSError.
"""
    page = "\n".join(PAGES["as_markdown"](docstring))
    assert (
        page
        == r"""
Out of x and \*rates &lt;k> of `<m>`.

```text
y = x * 2
z = <x>
```

- `image, size`: pixels and more.
- `ratio`: in `[0, 1]`.

Raises OSError."""
    )


def test_links_out_of_the_docs_lead_to_the_repository_on_the_site() -> None:
    shown = PAGES["on_page_markdown"]("[a](../kernels/x.py) [b](data.md)", {"repo_url": "https://example.org/x"})
    assert shown == "[a](https://example.org/x/blob/main/kernels/x.py) [b](data.md)"


def test_every_test_that_the_page_of_inputs_names_is_there() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs/inputs.md").read_text())
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
