"""Is what will be timed right on this device? Runs before anything is measured, and is the one place that decides it.

    python -m benchmarks.verify [--all] [--out FILE]
    python -m benchmarks.verify --device cpu --quick

Without --all the tests that say most: every op in bf16, forward and backward, against float64; a captured step against
an uncaptured one; inference's graphs against eager. They run one after the other, and fill Triton's cache for the rest.
Before them the package verifies its kernels itself, as it does before a run: a row an op, with the times of its forms.
With --all every test that needs a GPU, in as many processes as pay, each file in one of them.

A test that fails is a row, written when it fails, and so are the counts up to then. Exit status 1 where a test failed
or none ran, 2 without the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.record import ROOT, Recorder
from deitfast.model.factory import create_model
from deitfast.model.fused import question_about
from deitfast.verification.verify import TRAINING_OPS, verify

TELLING = ("tests/kernels", "tests/test_step.py", "tests/test_inference.py")
TELLING_NAMES = "bf16 and (float64 or captured or graphs)"
REHEARSAL = ("tests/kernels/test_catalogue.py",)
MOST_PROCESSES = 8
"""A context takes half a gigabyte of GPU memory, and small kernels of many processes take turns."""


class Rows:
    """A pytest plugin that keeps the counts and every failure in a results file as they come."""

    def __init__(self, recorder: Recorder, scope: str) -> None:
        self.recorder, self.scope, self.counts = recorder, scope, Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            words = (crash.message if crash else report.longreprtext).strip().splitlines()
            reason = words[0] if words else "no reason given"
            self.recorder.add({"key": {**self._key(), "test": report.nodeid}, "failed": reason})
        self.recorder.replace({"key": self._key(), "counts": dict(self.counts)})

    def _key(self) -> dict[str, str]:
        return {"op": "tests", "scope": self.scope}


def of_the_package(recorder: Recorder, scope: str) -> bool:
    """The package's own verdict on the ops of DeiT-B's step, as rows; whether every op is right."""
    with torch.device("meta"):  # its shapes are what is asked about
        question = question_about(create_model("deit_base_patch16_224"), TRAINING_OPS, 64, torch.bfloat16)
    verdict = verify(question, torch.device("cuda", 0), print)
    for op in verdict.ops:
        key = {"op": "tests", "scope": scope, "test": f"verification of {op.op}"}
        row = {"key": key, "answer": str(op), "forms": op.ms}
        recorder.add(row if op.right else row | {"failed": op.why})
    if verdict.unverified:
        key = {"op": "tests", "scope": scope, "test": "verification"}
        recorder.add({"key": key, "failed": verdict.unverified})
    return not verdict.unverified and all(op.right for op in verdict.ops)


def selection(options: argparse.Namespace) -> list[str]:
    """pytest's arguments: which tests, and over how many processes."""
    if options.tests:
        return [*options.tests]
    if options.device == "cpu":
        return ["-m", "not gpu and not slow", *REHEARSAL]
    if not options.all:
        return ["-m", "gpu", "-k", TELLING_NAMES, *TELLING]
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
    spread = ["-n", str(processes), "--dist", "loadfile"] if importlib.util.find_spec("xdist") else []
    return ["-m", "gpu", *spread, "tests"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=(__doc__ or "").split("\n")[0])
    arguments(parser)
    parser.add_argument("--all", action="store_true", help="every test that needs a GPU")
    parser.add_argument("tests", nargs="*", help="files to run instead")
    options = parser.parse_args(argv)
    if not ready("verify", options.device):
        return 2
    os.chdir(ROOT)
    with Recorder(options.out, "verify", options.device, options.quick) as recorder:
        rows = Rows(recorder, "all" if options.all else "telling")
        right = options.device == "cpu" or options.all or of_the_package(recorder, "telling")
        common: list[Any] = ["--tb=short", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
        status = pytest.main([*common, *selection(options)], plugins=[rows])
        words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(rows.counts.items())) or "no test ran"
        print(f"verify: {words}")
    return int(status != pytest.ExitCode.OK or not right)


if __name__ == "__main__":
    sys.exit(main())
