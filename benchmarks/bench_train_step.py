"""A whole training step (forward, loss, backward, AdamW, average), ours beside every peer, on data on the device.

    python -m benchmarks.bench_train_step [--models deit_base deit_small ...] [--ways ours timm ...] [--out FILE]
    python -m benchmarks.bench_train_step --device cpu --quick

Each way runs in a process of its own, with the same weights and the same batch in bf16 (autocast, fp32 master weights;
fp32 on CPU), no drop-path, and with the fastest attention backend for it. Before it is timed its first step is compared
with our eager model in fp32: a loss, gradient norm or logits that differ get no time. An absent library, a crash and
lack of memory are rows that say so. The ablation flips one switch of ours at a time.

Rows: milliseconds a step, images/s, MFU against the datasheet and the measured matmul rate, peak memory, seconds from
the start of the process to the end of the first step (imports, weights, compilation), hours for 300 ImageNet epochs,
and the GPU's clocks, power and temperature while it was timed.

--reuse takes over rows of an earlier file: of peers if machine, torch and the peer's version are the same, of ours if
the sources are too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring.command import arguments, fp32_is_fp32, last_json, ready, run_limited
from benchmarks.measuring.harness import Budget, Recorder, Refused, Roofs, load
from benchmarks.measuring.peers_models import version
from benchmarks.measuring.train_steps import OWN, Job, Reference, measured_roofs, reference, roof_from, work
from deitfast.errors import DeitfastError
from deitfast.model.work import full_name, gpu_of, hours_for_imagenet, mfu

MODELS = ("deit_base", "deit_small", "deit_tiny", "deit_base_384")
BATCHES = {"deit_base": 512, "deit_small": 512, "deit_tiny": 512, "deit_base_384": 128}
OURS = "ours"


@dataclass(frozen=True)
class Way:
    """One line of the comparison. seconds: what its worker is likely to need on a GPU, for planning.

    models: those it is compared at unless it is chosen; none: all. attention: of `Job`. precision: none: as ours.
    """

    library: str
    seconds: float = 45.0
    compile: str = ""
    models: tuple[str, ...] = ()
    attention: str = ""
    precision: str = ""


_BASE = ("deit_base",)
PEERS = {
    "timm + compile": Way("timm", 120.0, "default"),
    "timm + compile, cuDNN attention": Way("timm", 120.0, "default", _BASE, "cudnn"),
    "timm": Way("timm"),
    "transformer engine": Way("transformer engine", models=_BASE, attention=OWN),
    "transformer engine, fp8": Way("transformer engine", models=_BASE, attention=OWN, precision="fp8"),
    "timm, flash-attn 3": Way("timm", models=_BASE, attention="flash-attn 3"),
    "quack MLP, flash-attn 4": Way("quack", 120.0, models=_BASE, attention="flash-attn 4"),
    "torchvision": Way("torchvision", models=_BASE),
    "huggingface": Way("huggingface"),
    "timm + compile max-autotune": Way("timm", 300.0, "max-autotune"),
}
"""Most telling first."""

SWITCHES: dict[str, dict[str, Any]] = {
    "ours, no graph": {"engine": "flat"},
    "ours, plain loop": {"engine": ""},
    "ours, not fused": {"fused": False},
    "ours, no average": {"ema": False},
    "ours, drop-path .1": {"drop_path": 0.1},
    "ours, drop-path .1 by subset": {"drop_path": 0.1, "drop_path_form": "subset"},
    "ours, fp32": {"precision": "fp32"},
    "ours + compile": {"compile": "default", "engine": ""},
}
"""Our switches, each away from how `ours` runs on a GPU. A switch that training gains is one more line."""
CPU_SWITCHES: dict[str, dict[str, Any]] = {
    "ours, plain loop": {"engine": ""},
    "ours, fused": {"fused": True},
    "ours, no average": {"ema": False},
    "ours, bf16": {"precision": "bf16"},
    "ours, drop-path .1": {"drop_path": 0.1},
}

QUICK = (OURS, "timm", "ours, plain loop", "ours, fused")


def switches(device: str) -> dict[str, dict[str, Any]]:
    return SWITCHES if device == "cuda" else CPU_SWITCHES


def ways(device: str) -> list[str]:
    return [OURS, *PEERS, *switches(device)]


def job_of(way: str, model: str, batch: int, device: str, quick: bool) -> Job:
    """Ours as training runs it: on a GPU fused, in bf16, as a CUDA graph; on CPU eager, in fp32, uncaptured."""
    on_cuda = device == "cuda"
    base = Job(
        OURS, full_name(model), batch, device, "bf16" if on_cuda else "fp32", fused=on_cuda,
        engine="graph" if on_cuda else "flat", quick=quick,
    )  # fmt: skip
    if way == OURS:
        return base
    if way in PEERS:
        peer = PEERS[way]
        own = replace(base, library=peer.library, compile=peer.compile, attention=peer.attention)
        return replace(own, fused=False, engine="", precision=peer.precision or base.precision)
    return replace(base, **switches(device)[way])


def plan(models: Sequence[str], chosen: Sequence[str] | None, device: str) -> Iterator[tuple[str, str]]:
    """(model, way), most valuable first: ours and its strongest peers everywhere, then the rest, the ablation, the
    slow compilations. The ablation and the slow ones run at the first model alone, unless they are chosen."""
    everything = ways(device)
    strongest = [OURS, "timm + compile", "timm"]
    slow = [way for way in everything if way in ("timm + compile max-autotune", "ours + compile")]
    rest = [way for way in everything if way not in strongest + slow]
    for group, where in ((strongest, models), (rest, models[:1]), (slow, models[:1]), (rest + slow, models[1:])):
        for model, way in itertools.product(where, group):
            extra = model != models[0] and (way in slow or way in switches(device))
            offered = way not in PEERS or model in (PEERS[way].models or [model])
            if way in chosen if chosen else offered and not extra:
                yield model, way


# One way -------------------------------------------------------------------------------------------------------------


def run_worker(job: Job, expected: Path | None, seconds: float, kind: str = "step") -> dict[str, Any]:
    """The worker's row, or `failed`, `refused`, `absent` with the reason. kind: step, reference or roof."""
    message = {"kind": kind, "job": asdict(replace(job, launched=time.time())), "expected": expected and str(expected)}
    command = [sys.executable, "-m", "benchmarks.bench_train_step", "--worker", json.dumps(message)]
    finished = run_limited(command, seconds)
    row = last_json(finished.out) if finished.status == 0 else None
    return row if row is not None else {"failed": finished.problem}


def worker(text: str) -> int:
    """What a worker process does: one job, one line of JSON."""
    fp32_is_fp32()
    message = json.loads(text)
    job = Job(**message["job"])
    if message["kind"] == "roof":
        row: dict[str, Any] = measured_roofs(job)
    elif message["kind"] == "reference":
        row = asdict(reference(job))
    else:
        row = _attempt(job, message["expected"])
    print("\n" + json.dumps(row), flush=True)
    return 0


def _attempt(job: Job, expected: str | None) -> dict[str, Any]:
    import torch

    try:
        return work(job, Reference(**json.loads(Path(expected).read_text())) if expected else None)
    except Refused as problem:
        return {"refused": str(problem)}
    except ImportError as problem:
        return {"absent": f"{job.library}: {problem}"}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}


class References:
    """The first step of the eager fp32 model, computed once a model and batch, as files for the workers."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def of(self, job: Job, seconds: float) -> Path | str:
        """The file, or why there is none."""
        path = self.folder / f"{job.model}-{job.batch}.json"
        if not path.exists():
            row = run_worker(job, None, seconds, "reference")
            if "failed" in row:
                return row["failed"]
            path.write_text(json.dumps(row))
        return path


def derived(row: dict[str, Any], model: str, batch: int, gpu: str | None, roof: Roofs | None) -> dict[str, Any]:
    """images/s, MFU in percent and hours for a timed row."""
    speed = 1e3 * batch / row["ms"]
    sheet = gpu_of(gpu) if gpu else None
    return {
        "images_per_second": speed,
        "mfu_datasheet_percent": 100 * mfu(speed, model, sheet.tflops) if sheet else None,
        "mfu_roof_percent": 100 * mfu(speed, model, roof.tflops) if roof else None,
        "hours_300_epochs": hours_for_imagenet(speed),
    }


def machine(facts: dict[str, Any]) -> str:
    """What must be the same for a row to be taken over."""
    fields = ("gpu", "driver", "torch", "cuda", "triton", "cpu", "threads")
    return ", ".join(f"{name} {facts.get(name)}" for name in fields)


def reusable(files: Iterable[Path], facts: dict[str, Any], quick: bool) -> dict[str, dict[str, Any]]:
    """Rows of earlier files that still hold here, by their key as JSON."""
    found = {}
    for path in files:
        data = load(path)
        if data["quick"] != quick or machine(data["facts"]) != machine(facts):
            continue
        for row in data["rows"]:
            peer = row["key"].get("way") in PEERS
            same = (row.get("version") == version(PEERS[row["key"]["way"]].library)) if peer else False
            if not peer:
                same = row.get("sources") == facts["sources"]
            if "ms" in row and same:
                found[json.dumps(row["key"], sort_keys=True)] = row | {"reused": True}
    return found


# On screen -----------------------------------------------------------------------------------------------------------


def line(row: dict[str, Any]) -> str:
    key = row["key"]
    label = f"{key['model']:14} {key['batch']:5} {key['way']:28}"
    reason = next((kind for kind in ("refused", "failed", "absent", "skipped") if kind in row), None)
    if reason:
        return f"{label} {reason}: {row[reason]}"
    sheet, roof, memory = (row.get(n) for n in ("mfu_datasheet_percent", "mfu_roof_percent", "memory_gib"))
    first = f"first step {row['first_step_s']:.1f} s"
    return (
        f"{label} {row['images_per_second']:9.1f} images/s {row['ms']:9.2f} ms  MFU {_percent(sheet)} sheet "
        f"{_percent(roof)} roof  {'-' if memory is None else f'{memory:.1f} GiB'}  {first}"
        f"  {row['hours_300_epochs']:.1f} h{_clock(row)}{'  (taken over)' if row.get('reused') else ''}"
    )


def _clock(row: dict[str, Any]) -> str:
    mhz = row.get("clocks", {}).get("sm_mhz")
    return "" if mhz is None else f"  {mhz:.0f} MHz"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def best(rows: Iterable[dict[str, Any]], model: str, names: Iterable[str]) -> dict[str, Any] | None:
    """The fastest timed row of `model` among the ways `names`."""
    names = set(names)
    steps = (row for row in rows if row["key"].get("op") == "train_step" and "ms" in row)
    timed = [row for row in steps if row["key"]["model"] == model and row["key"]["way"] in names]
    return max(timed, key=lambda row: row["images_per_second"], default=None)


def ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ours against the best peer, a line a model."""
    lines = []
    for model in dict.fromkeys(row["key"]["model"] for row in rows):
        ours, peer = best(rows, model, [OURS]), best(rows, model, PEERS)
        if ours and peer:
            speeds = (ours["images_per_second"], peer["images_per_second"])
            lines.append(
                f"{model}, batch {ours['key']['batch']}: ours {speeds[0]:.1f} images/s, {peer['key']['way']} "
                f"{speeds[1]:.1f}: {speeds[0] / speeds[1]:.2f} x the best peer"
            )
    return lines


# The command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a way was refused, 2 without the device or for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train_step")
    arguments(parser)
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}; with --quick deit_tiny")
    parser.add_argument("--ways", nargs="+", help=f"default: all of {', '.join(ways('cuda'))}")
    parser.add_argument("--batch", type=int, help="images a step; default: 512, 128 at 384 px, 8 with --quick")
    parser.add_argument("--reuse", nargs="+", type=Path, default=[], help="results files to take rows over from")
    parser.add_argument("--roof", help="measured TFLOP/s,GB/s; default: measured first")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options.worker)
    if not ready("bench_train_step", options.device):
        return 2
    models = options.models or (["deit_tiny"] if options.quick else list(MODELS))
    try:
        unknown = [way for way in options.ways or [] if way not in ways(options.device)]
        if unknown:
            raise DeitfastError(f"way {unknown[0]!r} unknown; choose from {', '.join(ways(options.device))}")
        for model in models:
            full_name(model)
        if options.batch is not None and options.batch < 1:
            raise DeitfastError(f"--batch {options.batch} is not positive")
    except DeitfastError as error:
        print(f"bench_train_step: {error}", file=sys.stderr)
        return 2
    with (
        Recorder(options.out, "train_step", options.device, options.quick) as recorder,
        tempfile.TemporaryDirectory() as folder,
    ):
        compare_ways(recorder, models, options, References(folder), Budget(options.minutes))
        print("\n".join(ratios(recorder.rows)))
        for row in recorder.refused:
            print(f"REFUSED {row['key']['model']} {row['key']['way']}: {row['refused']}", file=sys.stderr)
        return 1 if recorder.refused else 0


def compare_ways(
    recorder: Recorder, models: Sequence[str], options: argparse.Namespace, references: References, budget: Budget
) -> None:
    """Run the plan within the budget; every row is recorded and printed as it comes."""
    facts = recorder.data["facts"]
    earlier = reusable(options.reuse, facts, options.quick)
    roof = roof_from([float(x) for x in options.roof.split(",")]) if options.roof else None
    for model, way in plan(models, options.ways or (QUICK if options.quick else None), options.device):
        batch = options.batch or (8 if options.quick else BATCHES.get(model, 128))
        job = job_of(way, model, batch, options.device, options.quick)
        key = {"op": "train_step", "model": model, "batch": batch, "precision": job.precision, "way": way}
        row = earlier.get(json.dumps(key, sort_keys=True))
        if row is None:
            if roof is None:
                measured = run_worker(job, None, budget.left, "roof")
                roof = None if "failed" in measured else Roofs(**measured)
            row = _run_way(way, job, references, budget) | {"key": key}
            if "ms" in row:
                row |= derived(row, model, batch, facts["gpu"], roof) | {"sources": facts["sources"]}
        if roof is not None and "roofs" not in recorder.data:
            recorder.note("roofs", asdict(roof))
        recorder.add(row)
        print(line(row), flush=True)


def _run_way(way: str, job: Job, references: References, budget: Budget) -> dict[str, Any]:
    likely = PEERS[way].seconds if way in PEERS else 120.0 if job.compile else 45.0
    if not budget.fits(likely / (4 if job.quick else 1)):
        return {"skipped": f"no time left ({budget.left:.0f} s; likely {likely:.0f} s)"}
    expected = None if job.drop_path else references.of(job, budget.left)
    if isinstance(expected, str):
        return {"failed": f"no reference: {expected}"}
    return run_worker(job, expected, min(budget.left, 3 * likely))


if __name__ == "__main__":
    sys.exit(main())
