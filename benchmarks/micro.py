"""Every op beside its baselines: check it, time it, print a table, write rows.

Every way of computing an op is called with the same tensors. The fused op is first compared with float64 at the very
shape that is timed, output and every gradient; where that fails, no way gets a number at that shape. Baselines are
compared too, with a wider margin: one that disagrees is listed as failed.

Every time is taken twice, with all other ways in between, so that the difference shows the noise. On a GPU what is
timed are replays of a CUDA graph (`launch`: "graph"), as in a training step; a way that cannot be captured is timed
as the host launches it ("stream"), and then the fused op is too, so that like is compared with like.

    python -m benchmarks.micro [OP ...] [--device cpu --quick] [--out FILE] [--minutes 8]

Attention's baselines are eager, torch.compile, every SDPA backend (cuDNN's by its name) and FlashAttention 2, 3 and 4:
they take the same packed tensor and give the same layout, so that they pay for the views and copies that a block around
them pays for. LayerNorm, its products and the MLP have Liger, QuACK and TransformerEngine (bf16 and FP8) beside them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import (
    Budget,
    Ran,
    Recorder,
    Roofs,
    in_turns,
    peak_bytes,
    roofs,
    rotating,
    timed_row,
    verify,
)
from benchmarks.measuring.ops import OPS, WORK, Way
from benchmarks.measuring.peers_ops import COMPILED, FUSED, Absent, factor_of, ways
from deitfast.errors import did_you_mean, first_line
from deitfast.kernels.catalogue import MODELS, Draw, Op, Shape, Tensors

FORWARD, BOTH = "forward", "forward+backward"
FROM_HOST = f"{FUSED}, from the host"
OURS = (FUSED, FROM_HOST)


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a case, and the gradient of the output."""

    tensors: Tensors
    dout: Tensor


@dataclass(frozen=True)
class Case:
    """One op at one shape, on one device in one dtype."""

    op: Op
    shape: Shape
    device: str
    dtype: torch.dtype

    def inputs(self, seed: int = 0) -> Inputs:
        draw = Draw(seed, self.dtype, self.device)
        tensors = self.op.inputs(draw, self.shape)
        for name, tensor in tensors.items():
            tensor.requires_grad_(name not in self.op.constants)
        return Inputs(tensors, draw.normal(*self.op.out(self.shape)))

    def forward(self, way: Way, inputs: Inputs) -> Tensor:
        return way(**inputs.tensors, **self.op.options(self.shape))

    def both(self, way: Way, inputs: Inputs) -> dict[str, Tensor]:
        """The output, as `out`, and the gradient of every input that has one."""
        out = self.forward(way, inputs)
        names = [name for name, tensor in inputs.tensors.items() if tensor.requires_grad]
        leaves = [inputs.tensors[name] for name in names]
        grads = torch.autograd.grad(out, leaves, inputs.dout.to(out.dtype)) if names else ()
        return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

    def exact(self, inputs: Inputs, chunk: int = 32) -> dict[str, Tensor]:
        """In float64 by the reference; where samples stand for themselves, `chunk` at a time, to save memory."""
        alone = self.op.per_sample
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, self.shape.batch, chunk if alone else self.shape.batch):
            part = {
                name: _exact(tensor.detach()[start : start + chunk] if name in alone else tensor.detach())
                for name, tensor in inputs.tensors.items()
            }
            for name, tensor in part.items():
                tensor.requires_grad_(name not in self.op.constants)
            dout = inputs.dout[start : start + chunk] if alone else inputs.dout
            results = self.both(self.op.reference, Inputs(part, dout.double()))
            for name, value in results.items():
                parts.setdefault(name, []).append(value)
        per_sample = {"out", *(f"d{name}" for name in alone)} if alone else set()
        return {
            name: torch.cat(values) if name in per_sample else torch.stack(values).sum(0)
            for name, values in parts.items()
        }

    def check(self, way: Way, inputs: Inputs, exact: Tensors, eager: Tensors, factors: tuple[float, float]) -> None:
        """Raise Refused unless the output and every gradient of `way` are about as close to float64 as eager's."""
        for name, value in self.both(way, inputs).items():
            verify(f"{self.op.name} {name}", value, exact[name], eager[name], factors[name != "out"])

    def step(self, way: Way, direction: str) -> Callable[[Inputs], object]:
        if direction == BOTH:
            return partial(self.both, way)

        def forward(inputs: Inputs) -> Tensor:
            with torch.no_grad():
                return self.forward(way, inputs)

        return forward


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def time_case(
    case: Case, chosen: dict[str, Way | Absent], recorder: Recorder, roof: Roofs, budget_ms: float, graph: bool
) -> None:
    """Check and time the `chosen` ways of a case, and record one row for each way and direction."""
    key = {"op": case.op.name, **case.shape.key(), "dtype": str(case.dtype).removeprefix("torch.")}
    for name, way in chosen.items():
        row = {"key": {"op": case.op.name, "way": name}, "absent": way.reason} if isinstance(way, Absent) else None
        if row and row not in recorder.rows:  # once is enough, not at every shape
            _report(recorder, row)
    present = {name: way for name, way in chosen.items() if not isinstance(way, Absent)}
    fused = present.get(FUSED, case.op.function)
    inputs = case.inputs()
    exact, eager = case.exact(inputs), case.both(case.op.reference, inputs)
    try:
        case.check(fused, inputs, exact, eager, (2.0, 3.0))
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # wrong, or it does not even run
        _report(recorder, {"key": key, "refused": first_line(problem)})
        return
    for name, way in list(present.items()):
        try:
            if name != FUSED:
                case.check(way, inputs, exact, eager, (factor_of(name), factor_of(name)))
        except Exception as problem:  # other people's code: an SDPA backend that does not take this shape, say
            _report(recorder, {"key": {**key, "way": name}, "failed": first_line(problem)})
            del present[name]
    del inputs, exact, eager
    seeds = itertools.count()
    sets = rotating(lambda: case.inputs(next(seeds)), case.device)
    directions = (FORWARD, BOTH) if sets[0].tensors.keys() - case.op.constants else (FORWARD,)
    for direction in directions:
        _time_direction(case, key, direction, present, sets, recorder, roof, budget_ms, graph)


def _time_direction(
    case: Case,
    key: dict[str, Any],
    direction: str,
    present: dict[str, Way],
    sets: Sequence[Inputs],
    recorder: Recorder,
    roof: Roofs,
    budget_ms: float,
    graph: bool,
) -> None:
    key = {**key, "pass": direction}
    found = _run(case, direction, present, sets, budget_ms, graph)
    launches = {ran.launch for ran in found.values()}
    ours_from_host = found[FUSED].launch == "stream" if FUSED in found else _ours(recorder.rows, key, "stream")
    if "stream" in launches and not ours_from_host:
        # What could not be captured is compared with the fused op launched the same way.
        ours = {FROM_HOST: present.get(FUSED, case.op.function)}
        found |= _run(case, direction, ours, sets, budget_ms, graph=False)
        present = present | ours
    flops, nbytes = WORK[case.op.name](case.shape).total(direction == BOTH, case.dtype.itemsize)
    for name, ran in sorted(found.items(), key=lambda item: item[0] not in OURS):
        if ran.problem is not None:
            _report(recorder, {"key": {**key, "way": name}, "failed": ran.problem})
            continue
        row = timed_row({**key, "way": name}, ran.timings, flops, nbytes, roof) | ran.how
        row["peak_bytes"] = peak_bytes(partial(case.step(present[name], direction), sets[0]), case.device)
        if name not in OURS and (ours_ms := _ours(recorder.rows, key, ran.launch)):
            row["fused_speedup"] = row["ms"] / ours_ms
        _report(recorder, row)


def _run(
    case: Case, direction: str, ways: dict[str, Way], sets: Sequence[Inputs], budget_ms: float, graph: bool
) -> dict[str, Ran]:
    calls = {name: case.step(way, direction) for name, way in ways.items()}
    return in_turns(calls, device=case.device, sets=sets, budget_ms=budget_ms, graph=graph)


def _ours(rows: Sequence[dict[str, Any]], key: dict[str, Any], launch: str) -> float | None:
    """Milliseconds of the fused op at `key`, launched as `launch` says."""
    keys = [{**key, "way": name} for name in OURS]
    return next((row["ms"] for row in rows if row["key"] in keys and row.get("launch") == launch), None)


# On screen -----------------------------------------------------------------------------------------------------------


def _report(recorder: Recorder, row: dict[str, Any]) -> None:
    """Record a row and print it in one line."""
    recorder.add(row)
    key = row["key"]
    shape = Shape.of(key["model"], key["tokens"], key["batch"]) if "model" in key else "any shape"
    label = f"{key['op']:15} {shape!s:12}"
    way = f"{key.get('way', ''):15} {key.get('pass', ''):16}"
    reason = next((kind for kind in ("refused", "failed", "absent", "skipped") if kind in row), None)
    print(f"{label} {way} {f'{reason}: {row[reason]}' if reason else _numbers(row)}", flush=True)


def _numbers(row: dict[str, Any]) -> str:
    memory = "" if row["peak_bytes"] is None else f" {row['peak_bytes'] / 2**20:8.0f} MiB"
    low, high = (sum(run[name] for run in row["runs"]) / len(row["runs"]) for name in ("p20_ms", "p80_ms"))
    speedup = f" fused {row['fused_speedup']:.2f}x" if "fused_speedup" in row else ""
    return (
        f"{row['ms']:9.4f} ms ({low:.4f} to {high:.4f}) {row['tflops']:7.2f} TFLOP/s {row['gbps']:7.1f} GB/s "
        f"{row['roof_percent']:5.1f} % of the {row['bound']} roof{memory}{speedup}"
    )


def table(op: str, rows: Iterable[dict[str, Any]]) -> str:
    """One line a shape and direction: the fused op's numbers, then how many times as long each baseline takes."""
    rows = [row for row in rows if row["key"]["op"] == op and "ms" in row]
    baselines = list(dict.fromkeys(row["key"]["way"] for row in rows if row["key"]["way"] not in OURS))
    head = f"{'shape':12} {'pass':16} {'fused ms':>9} {'TFLOP/s':>8} {'GB/s':>7} {'roof %':>6} {'MiB':>6}"
    lines = [f"== {op}", head + "".join(f" {name:>14}" for name in baselines)]
    for ours in (row for row in rows if row["key"]["way"] == FUSED):
        key = ours["key"]
        peers = {row["key"]["way"]: row for row in rows if row["key"] == {**key, "way": row["key"]["way"]}}
        memory = "-" if ours["peak_bytes"] is None else f"{ours['peak_bytes'] / 2**20:.0f}"
        line = f"{Shape.of(key['model'], key['tokens'], key['batch'])!s:12} {key['pass']:16} {ours['ms']:9.4f}"
        line += f" {ours['tflops']:8.2f} {ours['gbps']:7.1f} {ours['roof_percent']:6.1f} {memory:>6}"
        for name in baselines:
            value = f"{peers[name]['fused_speedup']:.2f}x" if "fused_speedup" in peers.get(name, {}) else "-"
            line += f" {value:>14}"
        lines.append(line)
    return "\n".join(lines)


# The command ---------------------------------------------------------------------------------------------------------


def shapes(quick: bool) -> list[Shape]:
    """DeiT's shapes, the most telling first; few and tiny with `quick`."""
    if quick:
        return [Shape.of("Ti", 5, 3)]
    ordered = [(197, 256), (577, 32), (198, 256), (197, 64), (577, 128), (197, 512)]
    return [Shape.of(model, tokens, batch) for tokens, batch in ordered for model in ("B", "S", "Ti")]


def main(argv: Sequence[str] | None = None, ops: dict[str, Op] | None = None) -> int:
    """Exit status 1 where an op is refused, 2 without the device.

    ops: definitions in place of `benchmarks.measuring.ops.OPS`.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.micro", description=__doc__.split("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(OPS)}")
    arguments(parser)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: 197 198 577")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 32 to 512")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes longest")
    parser.add_argument("--no-graph", action="store_true", help="time what the host launches, not a CUDA graph")
    options = parser.parse_args(argv)
    names = options.ops or list(OPS)
    if unknown := [name for name in names if name not in OPS]:
        print(f"micro: op {unknown[0]!r} unknown.{did_you_mean(unknown[0], OPS)}", file=sys.stderr)
        return 2
    if not ready("micro", options.device):
        return 2
    selected = [
        shape
        for shape in shapes(options.quick)
        if (not options.models or shape.model in options.models)
        and (not options.tokens or shape.tokens in options.tokens)
        and (not options.batches or shape.batch in options.batches)
    ]
    if not selected:
        every = ", ".join(map(str, shapes(options.quick)))
        print(f"micro: no shape is left of {every}; change --models, --tokens or --batches", file=sys.stderr)
        return 2
    with Recorder(options.out, "micro", options.device, options.quick) as recorder:
        time_all([(OPS if ops is None else ops)[name] for name in names], selected, recorder, options)
        for name in names:
            print(table(name, recorder.rows))
        for row in recorder.refused:
            print(f"REFUSED {row['key']['op']}: {row['refused']}", file=sys.stderr)
        return 1 if recorder.refused else 0


def time_all(ops: Sequence[Op], selected: Sequence[Shape], recorder: Recorder, options: argparse.Namespace) -> None:
    """Every op at every shape within the minutes; what there is no time for is a row that says so."""
    budget, dtype = Budget(options.minutes), torch.bfloat16 if options.device == "cuda" else torch.float32
    roof = roofs(options.device, options.quick)
    recorder.note("roofs", asdict(roof))
    print(f"roof: {roof.tflops:.1f} TFLOP/s, {roof.gbps:.0f} GB/s")
    slowest = {False: 0.0, True: 0.0}
    # torch.compile comes in a round of its own, last: it takes longer than all else and must not crowd it out.
    rounds = (False, True) if not options.no_compile else (False,)
    for compiled, shape, op in itertools.product(rounds, selected, ops):
        case = Case(op, shape, options.device, dtype)
        if not budget.fits(slowest[compiled] or 1.0):
            key = {"op": op.name, **shape.key(), "dtype": str(dtype).removeprefix("torch.")}
            _report(recorder, {"key": key | ({"way": COMPILED} if compiled else {}), "skipped": "no time left"})
            continue
        chosen = {way: call for way, call in ways(op, options.device).items() if compiled == (way == COMPILED)}
        if compiled:
            torch.compiler.reset()
        start = time.monotonic()
        try:
            time_case(case, chosen, recorder, roof, 10.0 if options.quick else 50.0, not options.no_graph)
        except torch.OutOfMemoryError as problem:
            _report(recorder, {"key": {"op": op.name, **shape.key()}, "failed": first_line(problem)})
        slowest[compiled] = max(slowest[compiled], time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
