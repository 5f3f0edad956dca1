"""Collected only where the pretended device is installed (`python -m tests.rehearsal`); what its tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "tests.rehearsal.memory" not in sys.modules:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def only_the_tables_entries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Beside them an op offers some twenty others, which take a second each; a test that wants one puts this back."""
    from deitfast.verification.choice import Offers

    every = Offers.of
    monkeypatch.setattr(Offers, "of", lambda self, selection: [])
    return every


@pytest.fixture(autouse=True)
def one_round_of_a_pretended_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the same time in every round and replay, and each replay computes the op on the CPU."""
    from deitfast.verification import timing

    monkeypatch.setattr(timing, "ROUNDS", 1)
    monkeypatch.setattr(timing, "ROUND_MS", 0.0)


@pytest.fixture
def a_gpu_seen_for_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdict is known yet; what is known of data sets, whose images each test would look at again, stays."""
    from deitfast.verification import verdict

    monkeypatch.setattr(verdict, "cache_folder", lambda kind: tmp_path / "home" / kind)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Every test begins, and must end, on cuda:0 and its default stream, with no capture under way."""
    import torch

    from tests.rehearsal import capture, cuda

    cuda.EVENTS.clear()
    yield
    broken, at = list(capture.ACTIVE), (torch.cuda.current_device(), torch.cuda.current_stream().stream_id)
    while capture.ACTIVE:
        capture.ACTIVE.pop().__exit__(None, None, None)
    torch.cuda.set_stream(torch.cuda.default_stream(0))
    assert at == (0, 0), "the test leaves this thread on another device or stream"
    assert not broken, "the test leaves a capture under way"
