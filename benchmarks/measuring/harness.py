"""What every benchmark shares: timing, the roof of the machine, the check before the number, and the results file.

    with Recorder(path, "attention", device) as recorder:
        roof = roofs(device, quick)
        verify("attention", actual, reference64, eager)                      # raises Refused
        runs = [measure(call, device=device, sets=sets) for _ in range(2)]   # twice: the spread is the noise
        recorder.add(timed_row({"op": "attention", "way": "fused"}, runs, flops, nbytes, roof))

A row names what it measured in `key`; `benchmarks.compare` matches rows of two files by it. A row has either `runs`
(and the numbers derived from them) or one of `refused`, `failed`, `absent` and `skipped` with the reason.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.measuring.record import Device, Recorder, facts, gpu_state, load
from deitfast.cuda_graph import capture
from deitfast.errors import first_line
from deitfast.verification.judgement import problem

__all__ = [
    "Budget", "Device", "Ran", "Recorder", "Refused", "Roofs", "Timing", "facts", "gpu_state", "in_turns", "load",
    "measure", "peak_bytes", "rates", "roofs", "rotating", "synchronize", "timed_row", "verify",
]  # fmt: skip
T = TypeVar("T")
RUNS = 2
"""Measurements of everything, so that every row tells its own noise."""


class Refused(Exception):
    """A result is wrong, so nothing about its speed may be shown; the message says how wrong."""


# Time ----------------------------------------------------------------------------------------------------------------


class Budget:
    """Minutes that a command may take."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; negative where the time is over."""
        return self.end - time.monotonic()

    def fits(self, seconds: float) -> bool:
        return self.left >= seconds


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile in milliseconds, and over how many samples."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        ordered = sorted(milliseconds)

        def at(fraction: float) -> float:
            return ordered[round(fraction * (len(ordered) - 1))]

        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


def synchronize(device: Device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def l2_bytes(device: Device) -> int:
    """Size of the second-level cache; 0 on CPU."""
    if torch.device(device).type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20


def rotating(make_inputs: Callable[[], T], device: Device, most: int = 64) -> list[T]:
    """As many sets from `make_inputs` as together hold twice the L2 (at most `most`); one on CPU."""
    sets = [make_inputs()]
    size = sum(leaf.nbytes for leaf in tree_leaves(sets[0]) if isinstance(leaf, Tensor))
    count = math.ceil(2 * l2_bytes(device) / max(size, 1))
    return sets + [make_inputs() for _ in range(min(count, most) - 1)]


def measure(
    call: Callable[..., object],
    *,
    device: Device,
    sets: Sequence[Any] | None = None,
    budget_ms: float = 200.0,
    warmup: int = 3,
    flush: bool = True,
    graph: bool = False,
    most: int = 500,
) -> Timing:
    """Time `call()`, or `call(sets[i])` over the sets in turn, for about `budget_ms` and at least three samples.

    On CUDA every sample lies between two events, and the host waits once, at the end; on CPU the clock is
    `perf_counter`. A sample is one call, with `graph` one lap over the sets divided by their number.

    warmup: calls before the first sample; they include all that happens only once, so compile before.
    flush: without `sets`, overwrite the L2 before each sample.
    graph: on CUDA, capture a lap over the sets and time its replays, so that a short op is not timed as the launches
        of its host; RuntimeError where it cannot be captured. No effect on CPU.
    """
    on_cuda = torch.device(device).type == "cuda"
    laps: list[Callable[[], object]] = [call] if sets is None else [partial(call, inputs) for inputs in sets]
    calls = 1
    if graph and on_cuda:
        calls, eager = len(laps), laps

        def lap_over_all() -> None:
            for lap in eager:
                lap()

        laps = [capture(lap_over_all)[0].replay]
    scratch = None
    if flush and on_cuda and sets is None:
        scratch = torch.empty(2 * l2_bytes(device), dtype=torch.int8, device=device)
    for i in range(max(warmup, 1)):
        laps[i % len(laps)]()
    synchronize(device)
    start = time.perf_counter()
    laps[0]()
    synchronize(device)
    estimate = 1e3 * (time.perf_counter() - start)
    samples = min(max(3, math.ceil(budget_ms / max(estimate, 1e-3))), most)
    if not on_cuda:
        seconds = []
        for i in range(samples):
            start = time.perf_counter()
            laps[i % len(laps)]()
            seconds.append(time.perf_counter() - start)
        return Timing.of([1e3 * value for value in seconds])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for i, (before, after) in enumerate(events):
        if scratch is not None:
            scratch.zero_()
        before.record()
        laps[i % len(laps)]()
        after.record()
    synchronize(device)
    return Timing.of([before.elapsed_time(after) / calls for before, after in events])


@dataclass
class Ran:
    """How one way ran. launch: graph, or stream where the host launched every kernel.

    problem: why it did not run; uncaptured: why it was not captured, where that was tried.
    """

    timings: list[Timing]
    launch: str = ""
    problem: str | None = None
    uncaptured: str | None = None

    @property
    def how(self) -> dict[str, str]:
        """What a row says of it."""
        return {"launch": self.launch} | ({"uncaptured": self.uncaptured} if self.uncaptured else {})


def in_turns(
    calls: Mapping[str, Callable[..., object]],
    *,
    device: Device,
    sets: Sequence[Any] | None = None,
    budget_ms: float = 200.0,
    graph: bool = True,
) -> dict[str, Ran]:
    """Time every call as `measure` does, twice, with all others in between, so that the difference shows the noise.

    graph: on CUDA time replays of a CUDA graph, as in a training step. A call that cannot be captured is timed as the
    host launches it, and may be compared only with what was launched so, too.
    """
    found = {name: Ran([]) for name in calls}
    for _, (name, call) in itertools.product(range(RUNS), calls.items()):
        ran = found[name]
        if ran.problem is not None:
            continue
        try:
            captured = graph and ran.launch != "stream" and torch.device(device).type == "cuda"
            ran.timings.append(_timed(ran, call, captured, device=device, sets=sets, budget_ms=budget_ms))
        except RuntimeError as problem:  # out of memory
            ran.problem = first_line(problem)
    return found


def _timed(ran: Ran, call: Callable[..., object], captured: bool, **options: Any) -> Timing:
    """Time `call`, and say in `ran` how it was launched."""
    if captured:
        try:
            timing = measure(call, graph=True, **options)
            ran.launch = "graph"
            return timing
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:  # it may not be captured; what the host launches can be timed all the same
            ran.uncaptured = first_line(problem)
            torch.cuda.synchronize()
    timing = measure(call, **options)
    ran.launch = "stream"
    return timing


def peak_bytes(call: Callable[[], object], device: Device) -> int | None:
    """Device memory that `call` takes at its peak beyond what was taken before; None on CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


# The roof ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings: TFLOP/s of a large matrix product and GB/s (read plus written) of a large copy."""

    tflops: float
    gbps: float


def roofs(device: Device, quick: bool = False) -> Roofs:
    """Measure both ceilings: an 8192^3 product in bf16 on random data and a copy of 1 GiB; small and fp32 on CPU."""
    on_cuda = torch.device(device).type == "cuda"
    size = 8192 if on_cuda else 256 if quick else 1024
    dtype = torch.bfloat16 if on_cuda else torch.float32
    budget = 50.0 if quick else 300.0

    def product() -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        timing = measure(lambda: torch.mm(a, b, out=out), device=device, budget_ms=budget, flush=False)
        return 2 * size**3 / max(timing.median_ms, 1e-6) / 1e9

    def copy() -> float:
        source = torch.randn((1 << 30 if on_cuda else 1 << 24) // 4, device=device)
        target = torch.empty_like(source)
        timing = measure(lambda: target.copy_(source), device=device, budget_ms=budget, flush=False)
        return 2 * source.nbytes / max(timing.median_ms, 1e-6) / 1e6

    return Roofs(tflops=product(), gbps=copy())


def rates(flops: float, nbytes: float, timing: Timing, roof: Roofs) -> dict[str, Any]:
    """What `timing` achieved: tflops, gbps, and the percentage of the roof.

    flops, nbytes: what one call must compute and move at the least, not what an implementation happens to do. The
    floor is the larger of the two times that the measured roofs give; `bound` says which.
    """
    ms = max(timing.median_ms, 1e-6)
    compute, memory = flops / roof.tflops / 1e9, nbytes / roof.gbps / 1e6
    return {
        "tflops": flops / ms / 1e9,
        "gbps": nbytes / ms / 1e6,
        "floor_ms": max(compute, memory),
        "roof_percent": 100 * max(compute, memory) / ms,
        "bound": "compute" if compute >= memory else "memory",
    }


def timed_row(
    key: Mapping[str, Any], runs: Sequence[Timing], flops: float = 0.0, nbytes: float = 0.0, roof: Roofs | None = None
) -> dict[str, Any]:
    """A row of results: `key`, every run, `ms` (the mean of their medians), and the rates where there is a roof."""
    ms = statistics.fmean(run.median_ms for run in runs)
    row = {"key": dict(key), "ms": ms, "runs": [asdict(run) for run in runs]}
    if roof is not None:
        row |= rates(flops, nbytes, Timing(ms, ms, ms, 0), roof)
    return row


# Correctness ---------------------------------------------------------------------------------------------------------


def verify(
    name: str,
    actual: Tensor,
    reference64: Tensor,
    eager: Tensor,
    factor: float = 2.0,
    magnitude: Tensor | None = None,
) -> None:
    """Raise Refused where `actual` is not right by the package's own rule, with the same arguments."""
    if why := problem(name, actual, reference64, eager, factor, magnitude=magnitude):
        raise Refused(why)
