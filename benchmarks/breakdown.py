"""Where one training step's time goes, by kind of kernel, beside the floor on paper and the plan.

    python -m benchmarks.breakdown --model deit_base [--batch 512] [--way ours] [--out FILE]
    python -m benchmarks.breakdown --device cpu --quick

The step runs four times under torch.profiler: whole, for the gaps between kernels, and as forward, backward and update,
so that each kernel's phase is known without guessing from its name. Microseconds an image. On a GPU kernels are
counted, on CPU operators (their own time): a rehearsal. A part above its budget is marked; the budget is the plan of
`benchmarks.roofline` for DeiT-B at 224 px and 512 images on one H100, the floor follows from the roof measured here.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_train_step import BATCHES, OURS, job_of, ways
from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Recorder, Timing, measure, roofs, synchronize, timed_row
from benchmarks.measuring.train_steps import TrainStep, make_train_step
from benchmarks.roofline import PLANNED_MODEL, plan
from deitfast.errors import DeitfastError
from deitfast.model.work import full_name, part_floors

PARTS = {
    "GEMM forward": ("GEMM forward",),
    "GEMM backward": ("GEMM dgrad", "GEMM wgrad"),
    "attention": ("attention",),
    "norm, elementwise": ("norm",),
    "optimiser": ("optimiser",),
    "input, heads, loss": ("input",),
    "other": (),
    "gaps": ("gaps",),
}
"""Part measured here -> parts of the budget."""

_KINDS = (
    # torch.compile names a pointwise kernel after everything that is fused into it.
    ("norm, elementwise", r"^triton_(poi|red|per|for)"),
    ("attention", r"attention|attn|flash|fmha|sdpa"),
    ("input, heads, loss", r"conv|fprop|implicit|im2col|nchw|nhwc|softmax|nll_loss|gather|scatter|patch|entropy|bce"),
    ("GEMM", r"gemm|gemv|cutlass|nvjet|wgmma|splitk|triton_tem|linear_|(^|::)(mm|addmm|bmm|baddbmm|linear|matmul)$"),
    (
        "norm, elementwise",
        r"norm|elementwise|reduce|cat|copy|fill|vectorized|memcpy|memset|index|gelu|scale_and_sum|row_sums|subset_rows"
        r"|(^|::)(add|sub|mul|div|sum|mean|to|zero|clone|empty|select|slice|view|reshape|expand|t|transpose)\w*$",
    ),
)
"""(part, pattern of a kernel's or operator's name), the first that matches."""
Spans = list[tuple[str, float, float]]
"""(kernel, start, end) in microseconds."""


def part_of(kernel: str, phase: str) -> str:
    """The part that a kernel (or, on CPU, an operator) belongs to. phase: forward, backward or update."""
    if phase == "update":
        return "optimiser"
    for kind, pattern in _KINDS:
        if re.search(pattern, kernel.lower()):
            return f"GEMM {phase}" if kind == "GEMM" else kind
    return "other"


def busy(spans: Iterable[tuple[str, float, float]]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, last = 0.0, float("-inf")
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        total += max(0.0, end - max(start, last))
        last = max(last, end)
    return total


def traced(call: Callable[[], Any], device: str) -> tuple[Spans, float]:
    """(kernels that `call` ran, microseconds from first to last). On CPU the operators' own times, end to end."""
    on_cuda = device == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = 1e6 * (time.perf_counter() - start)
    if not on_cuda:
        spans, now = [], 0.0
        for event in profiler.events():
            spans.append((event.name, now, now + event.self_cpu_time_total))
            now += event.self_cpu_time_total
        return spans, wall
    # Named ranges of the host appear among the device's events too, and are no kernels.
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    return spans, max(e for _, _, e in spans) - min(s for _, s, _ in spans) if spans else 0.0


def profile_step(step: TrainStep, device: str) -> tuple[dict[str, float], dict[str, Counter[str]], float]:
    """(part -> microseconds a step, part -> kernel -> microseconds, microseconds of the whole step)."""
    whole, elapsed = traced(step, device)
    parts = dict.fromkeys(PARTS, 0.0)
    parts["gaps"] = max(elapsed - busy(whole), 0.0)
    kernels: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    loss: list[torch.Tensor] = []
    phases: dict[str, Callable[[], Any]] = {
        "forward": lambda: loss.append(step.forward()[0]),
        "backward": lambda: step.backward(loss.pop()),
        "update": step.update,
    }
    for phase, call in phases.items():
        for name, start, end in traced(call, device)[0]:
            part = part_of(name, phase)
            parts[part] += end - start
            kernels[part][name] += end - start  # type: ignore[assignment, operator]
    return parts, kernels, elapsed


def rows_of(model: str, batch: int, way: str, device: str, recorder: Recorder, quick: bool) -> list[dict[str, Any]]:
    """Profile twice (the spread is the noise) and make a row of every part, and of the sum."""
    step = make_train_step(job_of(way, model, batch, device, quick))
    timing = measure(step, device=device, budget_ms=200.0 if quick else 1000.0, warmup=1 if quick else 3, flush=False)
    roof = roofs(device, quick)
    recorder.note("roofs", asdict(roof))
    floors = part_floors(model, batch, roof.tflops, roof.gbps) | {"gaps": 0.0}
    planned = plan() if full_name(model) == PLANNED_MODEL and device == "cuda" else {}
    traced(step, device)  # the profiler's own first use
    found = [profile_step(step, device) for _ in range(1 if quick else 2)]
    rows = []
    for part, members in PARTS.items():
        key = {"op": "breakdown", "model": model, "batch": batch, "way": way, "part": part}
        row = timed_row(key, [_once(parts[part]) for parts, _, _ in found])
        row["us_image"] = 1e3 * row["ms"] / batch
        row["floor_us"] = sum(floors[member] for member in members)
        row["budget_us"] = sum(planned[member] for member in members) if planned and members else None
        row["over"] = row["budget_us"] is not None and row["us_image"] > row["budget_us"]
        row["kernels"] = [[name, us / batch] for name, us in found[-1][1][part].most_common(6)]
        rows.append(row)
    key = {"op": "breakdown", "model": model, "batch": batch, "way": way, "part": "step"}
    total = timed_row(key, [_once(elapsed) for _, _, elapsed in found])
    total |= {"us_image": 1e3 * total["ms"] / batch, "floor_us": sum(floors.values()), "kernels": []}
    total["budget_us"] = sum(planned.values()) if planned else None
    total["over"] = bool(planned) and total["us_image"] > total["budget_us"]
    total["unprofiled_us_image"] = 1e3 * timing.median_ms / batch
    return [*rows, total]


def _once(microseconds: float) -> Timing:
    milliseconds = microseconds / 1e3
    return Timing(milliseconds, milliseconds, milliseconds, 1)


def table(rows: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """A line a part; markdown for the page, plain text for the screen."""
    head = ["part", "us an image", "floor", "budget", "", "largest kernels"]
    body = []
    for row in rows:
        budget = "-" if row["budget_us"] is None else f"{round(row['budget_us'], 1):g}"
        names = ", ".join(f"{_short(name)} {us:.1f}" for name, us in row["kernels"][:3])
        times = [f"{row['us_image']:.1f}", f"{row['floor_us']:.1f}", budget]
        body.append([row["key"]["part"], *times, "OVER" if row["over"] else "", names])
    if markdown:
        rule = ["---", "--:", "--:", "--:", "---", "---"]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])
    widths = (20, 12, 10, 8, 6)
    lines = []
    for cells in [head, *body]:
        first, *middle = cells[:4]
        text = f"{first:{widths[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(middle, widths[1:4], strict=True))
        lines.append(f"{text}  {cells[4]:{widths[4]}}{cells[5]}".rstrip())
    return "\n".join(lines)


def _short(kernel: str) -> str:
    """A kernel's name without namespaces and template arguments."""
    name = re.sub(r"^void ", "", kernel).split("<")[0].split("(")[0]
    return name.split("::")[-1].split(": ")[-1].replace("|", "/")[:44]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2 without the device or for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown")
    arguments(parser)
    parser.add_argument("--model", default=None, help="default deit_base; with --quick deit_tiny")
    parser.add_argument("--batch", type=int, help="default 512, 128 at 384 px, 4 with --quick")
    parser.add_argument("--way", default=OURS, help="as in bench_train_step (default ours)")
    options = parser.parse_args(argv)
    if not ready("breakdown", options.device):
        return 2
    model = options.model or ("deit_tiny" if options.quick else "deit_base")
    batch = options.batch or (4 if options.quick else BATCHES.get(model, 128))
    try:
        full_name(model)
        if options.way not in ways(options.device):
            raise DeitfastError(f"way {options.way!r} unknown; choose from {', '.join(ways(options.device))}")
    except DeitfastError as error:
        print(f"breakdown: {error}", file=sys.stderr)
        return 2
    with Recorder(options.out, "breakdown", options.device, options.quick) as recorder:
        for row in rows_of(model, batch, options.way, options.device, recorder, options.quick):
            recorder.add(row)
        print(f"{model}, batch {batch}, {options.way}, {options.device}: microseconds an image")
        print(table(recorder.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
