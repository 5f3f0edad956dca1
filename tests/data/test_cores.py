"""Data threads follow the process's mask, its container's quota and torchrun's processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deitfast.data import cores as module
from deitfast.data.cores import cores, thread_count


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup, on a machine with 16 cores."""
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 16), ("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_a_quota_of_cgroup_v2_is_kept_to(groups: Path, quota: str, expected: int) -> None:
    (groups / "cpu.max").write_text(f"{quota}\n")
    assert cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 16), ("600000", 6)])
def test_a_quota_of_cgroup_v1_is_kept_to(groups: Path, quota: str, expected: int) -> None:
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores() == expected


def test_processes_share_and_a_number_that_is_given_counts(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert thread_count(0) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert thread_count(0) == 2
    assert thread_count(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert thread_count(0) == 1
