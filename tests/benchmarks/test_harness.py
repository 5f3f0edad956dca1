"""The instrument itself: does it see a slow-down, refuse a wrong result, and keep what a cut-off run measured?"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading

import pytest
import torch

from benchmarks import bench_train_step
from benchmarks.measuring import command, harness, record
from benchmarks.measuring.harness import (
    Budget,
    Recorder,
    Refused,
    Roofs,
    Timing,
    load,
    measure,
    rates,
    roofs,
    timed_row,
    verify,
)
from benchmarks.measuring.record import ROOT

KEYS = {"date", "command", "commit", "sources", "device", "gpu", "driver", "python", "torch", "triton"}


# Time ----------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the machine's clock: only what is timed moves it on, whatever else the machine does."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.seconds)

    def sleep(self, seconds):
        self.seconds += seconds


def test_a_planted_slow_down_is_measured(monkeypatch):
    clock = Clock(monkeypatch)
    fast = measure(lambda: clock.sleep(0.002), device="cpu", budget_ms=20)
    slow = measure(lambda: clock.sleep(0.012), device="cpu", budget_ms=60)
    assert fast.median_ms == pytest.approx(2)
    assert slow.median_ms == pytest.approx(12)


def test_the_sets_take_turns():
    seen = []
    timing = measure(seen.append, device="cpu", sets=["a", "b", "c"], budget_ms=0.0, warmup=3)
    assert seen[:3] == ["a", "b", "c"]
    assert seen[4:7] == ["a", "b", "c"]
    assert timing.samples == 3


def test_warm_up_is_not_timed(monkeypatch):
    clock, calls = Clock(monkeypatch), []

    def call():
        calls.append(None)
        clock.sleep(0.05 if len(calls) <= 2 else 0.001)

    assert measure(call, device="cpu", budget_ms=1, warmup=2).p80_ms == pytest.approx(1)


def test_percentiles_are_those_of_the_samples():
    timing = Timing.of([float(value) for value in range(100, -1, -1)])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms, timing.samples) == (50, 20, 80, 101)


def test_rotating_needs_one_set_on_cpu_and_more_than_the_cache_elsewhere(monkeypatch):
    def make():
        return {"x": torch.zeros(256), "y": [torch.zeros(256)]}  # 2 KiB

    assert len(harness.rotating(make, "cpu")) == 1
    monkeypatch.setattr(harness, "l2_bytes", lambda device: 5 << 10)
    sets = harness.rotating(make, "cpu")
    assert len(sets) == 5
    assert len({inputs["x"].data_ptr() for inputs in sets}) == 5


def test_a_budget_runs_out():
    assert Budget(1).fits(30)
    assert not Budget(1).fits(61)
    assert not Budget(0).fits(0.1)


class FakeCuda:
    """Stands in for torch.cuda: events read a clock that each call moves on; counts what the host waits for."""

    def __init__(self, monkeypatch):
        self.now, self.waits, self.events, self.captures, self.lap = 0.0, 0, 0, 0, None
        self.capturing = False
        fake = self

        class Event:
            def __init__(self, enable_timing):
                fake.events += 1

            def record(self):
                self.at = fake.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.lap()

        class Stream:
            device = None

            def __init__(self, device=None):
                pass

            def wait_stream(self, other):
                pass

        @contextlib.contextmanager
        def capture(graph, pool, stream, capture_error_mode):
            fake.captures += 1
            fake.capturing = True
            try:
                yield
            finally:
                fake.capturing = False

        def wait(device=None):
            fake.waits += 1

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "set_stream": lambda stream: None,
            "graph": capture,
            "synchronize": wait,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_on_a_gpu_events_time_and_the_host_waits_once(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call(inputs):
        cuda.now += inputs

    timing = measure(call, device="cuda", sets=[2.0, 4.0, 6.0], budget_ms=1e6, most=30)
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms, timing.samples) == (4, 2, 6, 30)
    assert cuda.events == 60
    assert cuda.waits == 3, "after warm-up, after the estimate, and at the end"


def test_a_graph_is_a_lap_over_all_sets(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call(inputs):
        cuda.now += inputs

    cuda.lap = lambda: call(12.0)
    timing = measure(call, device="cuda", sets=[2.0, 4.0, 6.0], budget_ms=1e6, most=10, graph=True)
    assert timing.median_ms == 4, "a lap of 12 ms over three sets"
    assert cuda.captures == 1


def test_what_cannot_be_captured_is_timed_from_the_host_and_says_so(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def reads_on_the_host(inputs):
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.now += 8.0

    def fine(inputs):
        cuda.now += 1.0

    def too_large(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cuda.lap = lambda: fine(0)
    calls = {"fine": fine, "reads": reads_on_the_host, "too large": too_large}
    found = harness.in_turns(calls, device="cuda", sets=[0], budget_ms=1e6)
    assert {name: (ran.launch, ran.problem) for name, ran in found.items()} == {
        "fine": ("graph", None),
        "reads": ("stream", None),
        "too large": ("", "CUDA out of memory"),
    }
    assert [timing.median_ms for timing in found["reads"].timings] == [8.0, 8.0]
    assert found["reads"].how == {
        "launch": "stream",
        "uncaptured": "operation not permitted when stream is capturing",
    }
    assert found["fine"].how == {"launch": "graph"}
    assert cuda.captures == 3, "twice for the one that can be captured, once for the one that cannot"


# The roof ------------------------------------------------------------------------------------------------------------


def test_rates_are_arithmetic():
    roof = Roofs(tflops=2.0, gbps=100.0)
    ms = Timing(4.0, 4.0, 4.0, 1)
    found = rates(flops=4e9, nbytes=1e8, timing=ms, roof=roof)  # floors: 2 ms of arithmetic, 1 ms of memory
    assert found == pytest.approx(
        {"tflops": 1.0, "gbps": 25.0, "floor_ms": 2.0, "roof_percent": 50.0, "bound": "compute"}
    )
    assert rates(flops=0, nbytes=1e8, timing=ms, roof=roof)["bound"] == "memory"
    assert rates(flops=0, nbytes=1e8, timing=ms, roof=roof)["roof_percent"] == pytest.approx(25)


def test_the_roof_is_measured():
    roof = roofs("cpu", quick=True)
    assert roof.tflops > 0
    assert roof.gbps > 0


def test_a_row_keeps_both_runs():
    row = timed_row({"op": "x"}, [Timing(1, 1, 1, 5), Timing(3, 3, 3, 5)])
    assert row["ms"] == 2
    assert [run["median_ms"] for run in row["runs"]] == [1, 3]


# Correctness ---------------------------------------------------------------------------------------------------------


def rounded(dtype):
    reference = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return reference, reference.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_result_passes(dtype):
    reference, eager = rounded(dtype)
    verify("op", eager.clone(), reference, eager)


def test_planted_wrong_results_are_refused():
    reference, eager = rounded(torch.bfloat16)
    one_wrong = eager.clone()
    one_wrong[3, 5] += 0.25
    rough = eager * (1 + 2.0**-5)
    not_finite = eager.clone()
    not_finite[0, 0] = float("nan")
    for name, wrong in (("largest", one_wrong), ("2-norm", rough), ("not finite", not_finite)):
        with pytest.raises(Refused, match=name if name != "2-norm" else "error"):
            verify("op", wrong, reference, eager)
    with pytest.raises(Refused, match="shapes"):
        verify("op", eager[:3], reference, eager)
    with pytest.raises(Refused, match="dtypes"):
        verify("op", eager.float(), reference, eager)


def test_loss_of_precision_that_hides_below_one_outlier_is_refused():
    reference, eager = rounded(torch.bfloat16)
    reference[0, 0], eager[0, 0] = 1001.9, 1000.0  # eager's largest error is this one element's
    rough = eager + 0.5
    rough[0, 0] = eager[0, 0]
    with pytest.raises(Refused, match="2-norm"):
        verify("op", rough, reference, eager, magnitude=reference[1:])


# The results file ----------------------------------------------------------------------------------------------------


def test_the_recorder_says_where_and_when(tmp_path):
    path = tmp_path / "folder" / "results.json"
    with Recorder(path, "theme", "cpu", quick=True) as recorder:
        recorder.note("roofs", {"tflops": 1.0})
        recorder.add({"key": {"op": "x"}, "ms": 1.0})
        assert load(path)["rows"] == recorder.rows
        assert load(path)["finished"] is None
    data = load(path)
    assert data["facts"].keys() >= KEYS
    assert data["facts"]["torch"] == torch.__version__
    assert (data["theme"], data["quick"], data["roofs"]) == ("theme", True, {"tflops": 1.0})
    assert data["finished"]["date"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


CUT_OFF = """
import os, sys, time
from benchmarks.measuring.record import Recorder
recorder = Recorder(sys.argv[1], "cut", "cpu")
for i in range(10**6):
    recorder.add({"key": {"i": i}, "ms": 1.0})
    if i == 20:
        print("ready", flush=True)
"""


def test_a_run_that_is_killed_leaves_whole_json(tmp_path):
    path = tmp_path / "cut.json"
    command = [sys.executable, "-c", CUT_OFF, str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    data = load(path)
    assert len(data["rows"]) >= 21
    assert [row["key"]["i"] for row in data["rows"]] == list(range(len(data["rows"])))
    assert data["finished"] is None


def test_an_exception_leaves_the_file_unfinished(tmp_path):
    path = tmp_path / "failed.json"
    with pytest.raises(RuntimeError), Recorder(path, "theme", "cpu") as recorder:  # noqa: PT012
        recorder.add({"key": {}, "ms": 1.0})
        raise RuntimeError("out of memory")
    assert len(load(path)["rows"]) == 1
    assert load(path)["finished"] is None


def test_no_file_holds_what_is_not_json(tmp_path):
    path = tmp_path / "nan.json"
    recorder = Recorder(path, "theme", "cpu")
    with pytest.raises(ValueError, match="JSON"):
        recorder.add({"key": {}, "ms": float("nan")})
    json.loads(path.read_text())
    with pytest.raises(ValueError, match="recorder's own"):
        recorder.note("rows", [])


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', "{"])
def test_another_file_is_named_in_one_line(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not a results file"):
        load(path)


SMI = """#!/bin/sh
case "$*" in
*clocks_throttle_reasons*) echo 'Field "clocks_throttle_reasons.active" is not a valid field to query.'; exit 2;;
*driver_version*) echo "580.1";;
*clocks.sm*) echo "1980 MHz";;
*) exit 1;;
esac
"""


def test_a_field_that_nvidia_smi_does_not_know_costs_only_itself(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert harness.gpu_state() == {"driver": "580.1", "sm_clock": "1980 MHz"}
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert harness.gpu_state() is None


def test_clocks_are_read_while_the_body_runs(tmp_path, monkeypatch):
    readings = iter([("1980 MHz", "Active"), ("1410 MHz", "Not Active"), ("[N/A]", "Not Active")])
    read = threading.Event()

    def state():
        try:
            clock, reason = next(readings)
        except StopIteration:
            read.set()
            return None
        return {"sm_clock": clock, "power_draw": "650.12 W", "throttle_reasons": reason}

    monkeypatch.setattr(record, "gpu_state", state)
    with record.clocks() as seen:
        assert read.wait(60)
        assert seen == {}
    assert seen == {
        "sm_mhz": 1695.0,
        "sm_mhz_least": 1410.0,
        "power_w": 650.12,
        "throttle": ["Active", "Not Active"],
        "readings": 3,
    }
    monkeypatch.setattr(record, "gpu_state", lambda: None)
    with record.clocks() as seen:
        pass
    assert seen == {}


# fp32 ----------------------------------------------------------------------------------------------------------------


def test_fp32_is_fp32_in_commands_and_in_their_workers(monkeypatch, capsys):
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    job = {"library": "ours", "model": "deit_tiny_patch16_224", "batch": 1, "device": "cpu"}
    monkeypatch.setattr(bench_train_step, "measured_roofs", lambda _: {})
    try:
        for start in (
            lambda: command.ready("x", "cpu"),
            lambda: bench_train_step.worker(json.dumps({"kind": "roof", "job": job})),
        ):
            for switch in switches:
                switch.allow_tf32 = True
            start()
            assert [switch.allow_tf32 for switch in switches] == [False, False]
    finally:
        for switch, allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = allowed
