"""The parity report runs, passes on the packaged digits, and fails where an operation is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import augment_parity
from deitfast.data import cpu_ops

pytest.importorskip("nvidia.dali")


def test_it_passes_on_images(capsys):
    assert augment_parity.main(["--data", "digits", "--limit", "6"]) == 0
    printed = capsys.readouterr().out
    assert "translate y" in printed
    assert "the loader on cpu, 6 views" in printed
    assert "within the limits" in printed


def test_a_wrong_operation_fails_it(monkeypatch, capsys):
    monkeypatch.setitem(cpu_ops._OPERATIONS, "invert", lambda x, _: 254 - np.minimum(x, 254))
    monkeypatch.setattr(augment_parity, "SIZES", ((8, 9),))
    monkeypatch.setattr(augment_parity, "compare_loader", lambda *_: True)
    assert augment_parity.main(["--data", "digits", "--limit", "2"]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("invert")]
    assert row.count("!") == 1


def test_bad_input_is_one_line(capsys):
    assert augment_parity.main(["--data", "/nowhere/at/all"]) == 2
    assert augment_parity.main(["--data", "digits", "--limit", "1"]) == 2
    assert "--limit 1 must be at least 2" in capsys.readouterr().err
