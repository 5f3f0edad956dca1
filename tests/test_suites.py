"""`python -m tests.suites` on planted suites: it sees what differs, what may, and that nothing was fused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.suites import __main__ as suites

PLANTED = """
import pytest
import {library}
from {imports}

def fused():
    model = {model}
    return "fused by deitfast" in repr(model), model

def test_same():
    import torch
    with torch.no_grad():
        fused()[1].eval()(torch.zeros(1, 3, 32, 32))

@pytest.mark.parametrize("which", ["known", "new"])
def test_differs(which):
    assert not fused()[0], "a fused block"

def test_fails():
    raise ValueError("always")

def test_skipped():
    pytest.skip("always")
"""
TIMM = {
    "library": "timm",
    "imports": "timm.models import create_model",
    "model": "create_model('vit_tiny_patch16_224', img_size=32, embed_dim=64, num_heads=1, depth=1)",
}
TRANSFORMERS = {
    "library": "transformers",
    "imports": "transformers import ViTConfig, ViTForImageClassification",
    "model": "ViTForImageClassification(ViTConfig(image_size=32, hidden_size=64, num_attention_heads=1, "
    "num_hidden_layers=1, intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))",
}


@pytest.fixture
def planted(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library, of which `tmp_path` holds planted tests as its suite."""
    library: str = request.param["library"]
    (tmp_path / "test_planted.py").write_text(PLANTED.format(**request.param))
    known = suites.Suite(("test_planted.py",), differs={"differs[known]": "as planted", "differs[new]": "as planted"})
    monkeypatch.setitem(suites.SUITES, library, known)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("planted", [TIMM], ids=["timm"], indirect=True)
def test_what_differs_is_listed(planted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suites.compare(planted, tmp_path, [], None)
    said = capsys.readouterr().out
    assert "plain        3 passed, 1 failed, 1 skipped" in said
    assert "accelerated  1 passed, 3 failed, 1 skipped; 3 blocks replaced, 1 fused calls" in said
    assert "fails both times: test_planted.py::test_fails: ValueError: always" in said
    assert said.count("may differ: as planted") == 2


@pytest.mark.slow
@pytest.mark.parametrize("planted", [TRANSFORMERS], ids=["transformers"], indirect=True)
def test_every_model_of_transformers_is_accelerated_too(planted: str, tmp_path: Path) -> None:
    found = suites.run(planted, tmp_path, True, [], "")
    assert {name.split("::")[1]: outcome for name, outcome in found["outcomes"].items()} == {
        "test_same": "passed", "test_differs[known]": "failed", "test_differs[new]": "failed",
        "test_fails": "failed", "test_skipped": "skipped",
    }  # fmt: skip
    assert found["counts"] == {"blocks replaced": 3, "fused calls": 1}


def test_a_difference_without_a_reason_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    def run(library: str, checkout: Path, accelerate: bool, options: list[str], keywords: str) -> dict[str, object]:
        outcomes = {"a": "passed", "b": "failed" if accelerate else "passed", "c": "failed"}
        return {"outcomes": outcomes, "messages": {"c": "x"}, "counts": counts, "left": {}, "version": "1"}

    monkeypatch.setattr(suites, "run", run)
    monkeypatch.setitem(suites.SUITES, "timm", suites.Suite(()))
    counts = {"fused calls": 7}
    assert not suites.compare("timm", tmp_path, [], None)
    assert "differs: b: passed plain, failed accelerated" in capsys.readouterr().out
    monkeypatch.setitem(suites.SUITES, "timm", suites.Suite((), differs={"b": "of course"}))
    assert suites.compare("timm", tmp_path, [], None)
    counts = {}
    assert not suites.compare("timm", tmp_path, [], None), "no fused block ran"
    assert suites.differences({"a": "passed"}, {"b": "passed"}) == {
        "a": ("passed", "absent"),
        "b": ("absent", "passed"),
    }
