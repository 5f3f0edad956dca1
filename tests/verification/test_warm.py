"""What a search compiles ahead is what the run after it finds: for sm_90, on this CPU, in a cache of its own."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from deitfast.kernels.catalogue import OPS, Draw, Shape
from deitfast.kernels.gemm_kernels import linear_kernel
from deitfast.kernels.tunable import picked, recorded, selections
from deitfast.verification import warm
from deitfast.verification.case import Case
from tests.ptx import driver
from tests.ptx.kernels import compiled_kernels, needs_engine

SHAPE = Shape(width=64, heads=1, tokens=5, batch=16)


@needs_engine
def test_an_entry_is_compiled_once_and_nothing_is_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fresh = defaultdict(linear_kernel.create_binder)  # another test of this process may have compiled the same
    monkeypatch.setattr(linear_kernel, "device_caches", fresh)
    monkeypatch.setattr(driver.Launcher, "__call__", lambda *_: pytest.fail("launched"))
    drawn: dict[str, Any] = {"backward": False, "without": frozenset(), "subset": 0}

    def compiled() -> set[str]:
        return {path.read_text() for path in tmp_path.rglob("linear*.ptx")}

    with compiled_kernels(90):
        case = Case.draw(OPS["linear_residual"], SHAPE, Draw(1, torch.bfloat16), backward=False)
        with warm.compile_only(), selections() as asked:
            case.run(case.op.function)
        [own] = compiled()
        [name] = asked
        entry = asked[name].space[0]
        warm._compile("linear_residual", SHAPE, torch.bfloat16, "cpu", drawn, name, recorded(entry))
        [ptx] = compiled() - {own}
        assert ".target sm_90" in ptx
        with warm.compile_only(), picked({name: entry}):
            case.run(case.op.function)
        assert compiled() == {own, ptx}
