"""The measuring commands as they run on a GPU: what is captured and what is not, and what a question answers."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_inference, bench_loader, micro, questions, tune
from benchmarks.measuring import harness
from benchmarks.measuring.harness import Roofs
from benchmarks.workshop import Site
from deitfast.kernels.catalogue import Draw, Tensors

MODEL = "deit_digits_patch4_16"


@pytest.fixture(autouse=True)
def one_set_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a second-level cache that inputs must not lie in."""
    monkeypatch.setattr(harness, "l2_bytes", lambda _: 0)


def rows_of(command: Any, out: Path, *arguments: str) -> list[dict[str, Any]]:
    assert command([*arguments, "--device", "cuda", "--quick", "--out", str(out)]) == 0
    return json.loads(out.read_text())["rows"]


def moved(tensors: Tensors) -> Tensors:
    """To the pretended device, which has no generator of its own."""
    return {name: x.cuda() for name, x in tensors.items()}


@pytest.mark.parametrize("op", ["input_patches", "mlp_gelu", "mixed_bce"])
def test_an_op_is_timed_as_a_graph_beside_eager(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inputs(self: micro.Case, seed: int = 0) -> micro.Inputs:
        draw = Draw(seed, self.dtype)
        tensors = moved(self.op.inputs(draw, self.shape))
        for name, x in tensors.items():
            x.requires_grad_(name not in self.op.constants)
        return micro.Inputs(tensors, draw.normal(*self.op.out(self.shape)).cuda())

    monkeypatch.setattr(micro.Case, "inputs", inputs)
    monkeypatch.setattr(micro, "roofs", lambda *_: Roofs(1.0, 1.0))
    rows = rows_of(micro.main, tmp_path / "rows.json", op, "--no-compile")
    timed = [row for row in rows if "absent" not in row]
    assert {row["key"]["way"]: row["launch"] for row in timed} == {"fused": "graph", "eager": "graph"}


class HostDraw(Draw):
    """Draws on the host and brings over what it drew."""

    def normal(self, *shape: int, **how: float) -> torch.Tensor:
        return super().normal(*shape, **how).cuda()

    def activations(self, *shape: int, **how: Any) -> torch.Tensor:
        return super().activations(*shape, **how).cuda()


def test_questions_about_products_and_launches_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site_of = questions._site

    def site_with_inputs_moved(*which: Any) -> Site:
        site = site_of(*which)
        return replace(site, inputs=lambda draw, shape: moved(site.inputs(draw, shape)))

    monkeypatch.setattr(questions, "_site", site_with_inputs_moved)
    monkeypatch.setattr(questions, "Draw", lambda seed, dtype, device: HostDraw(seed, dtype))
    monkeypatch.setattr(tune, "Draw", lambda seed, dtype, device: Draw(seed, dtype))
    rows = rows_of(questions.main, tmp_path / "rows.json", "--only", "wgrad", "attention")
    assert all("ms" in row and len(row["runs"]) == 2 for row in rows), rows
    assert len(rows) == 2 + 3 + 3


def test_the_question_about_a_capture_has_an_answer() -> None:
    assert "its replay gave 2 (right: 2)" in questions.synchronise_in_a_capture()


def test_inference_is_timed(tmp_path: Path) -> None:
    rows = rows_of(bench_inference.main, tmp_path / "rows.json", "--models", MODEL, "--batches", "2", "--ways", "ours")
    assert all("ms" in row for row in rows)


def test_the_loader_is_timed_where_it_decodes(tmp_path: Path) -> None:
    ways = ("decode", "augmented, decode once")
    rows = rows_of(bench_loader.main, tmp_path / "rows.json", "--ways", *ways, "--threads", "1")
    assert [(row["key"]["way"], row["key"]["decode"]) for row in rows] == list(product(ways, bench_loader.PLACES))
    assert all("ms" in row for row in rows), rows
