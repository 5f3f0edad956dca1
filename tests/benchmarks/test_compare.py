"""`benchmarks.compare` on files whose differences are known."""

from __future__ import annotations

import copy

import pytest

from benchmarks import compare
from benchmarks.measuring.harness import Recorder, Timing, timed_row


def write(path, medians, extra=()):
    """medians: op -> milliseconds of its two runs."""
    with Recorder(path, "theme", "cpu") as recorder:
        for op, runs in medians.items():
            recorder.add(timed_row({"op": op, "way": "fused"}, [Timing(ms, ms, ms, 9) for ms in runs]))
        for row in extra:
            recorder.add(row)
    return str(path)


BEFORE = {"steady": (1.00, 1.02), "slower": (2.0, 2.1), "faster": (3.0, 3.1), "noisy": (1.0, 2.0)}


def test_equal_files_show_no_change(tmp_path, capsys):
    a, b = (write(tmp_path / name, BEFORE) for name in ("a.json", "b.json"))
    assert compare.main([a, b, "--fail"]) == 0
    assert capsys.readouterr().out == "0 faster, 0 slower, 4 same, 0 lost\n"


def test_planted_changes_are_found_and_noise_is_not(tmp_path, capsys):
    after = copy.deepcopy(BEFORE) | {"slower": (3.0, 3.1), "faster": (1.5, 1.6), "noisy": (1.9, 2.0)}
    a, b = write(tmp_path / "a.json", BEFORE), write(tmp_path / "b.json", after)
    assert compare.main([a, b, "--fail"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split() for line in lines[:-1]] == [
        ["slower", "slower", "fused"],
        ["faster", "faster", "fused"],
    ]
    assert lines[-1] == "1 faster, 1 slower, 2 same, 0 lost"
    assert compare.main([a, b]) == 0, "without --fail it only reports"
    assert compare.main([b, a, "--fail"]) == 1, "the other way round, `faster` is the regression"


def test_the_noise_is_the_spread_inside_either_file(tmp_path):
    quiet, noisy = {"x": (1.0, 1.0)}, {"x": (1.0, 1.4)}
    a, b = write(tmp_path / "a.json", quiet), write(tmp_path / "b.json", noisy)
    assert compare.main([a, b, "--fail"]) == 0
    assert compare.main([b, a, "--fail"]) == 0
    one_percent = write(tmp_path / "c.json", {"x": (1.009, 1.009)})
    assert compare.main([a, one_percent, "--fail"]) == 0
    assert compare.main([a, write(tmp_path / "d.json", {"x": (1.02, 1.02)}), "--fail"]) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"key": {"op": "slower"}, "refused": "wrong"}, "refused: wrong"),
        ({"key": {"op": "slower", "way": "fused"}, "failed": "no launch"}, "failed: no launch"),
        (None, "no such row"),
    ],
)
def test_a_row_that_is_lost_counts_as_a_regression(tmp_path, capsys, row, reason):
    after = {name: runs for name, runs in BEFORE.items() if name != "slower"}
    a = write(tmp_path / "a.json", BEFORE)
    b = write(tmp_path / "b.json", after, [row] if row else [])
    assert compare.main([a, b, "--fail"]) == 1
    assert f"lost    slower fused: {reason}" in capsys.readouterr().out


def test_what_is_no_results_file_or_shares_nothing_is_said(tmp_path, capsys):
    a, other = write(tmp_path / "a.json", BEFORE), tmp_path / "b.json"
    assert compare.main([a, str(other)]) == 2
    assert "b.json: not a results file" in capsys.readouterr().err
    write(other, {"another": (1.0, 1.0)})
    assert compare.main([a, str(other)]) == 2
    assert "no row in common" in capsys.readouterr().err
