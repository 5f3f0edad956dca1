"""DeiT on one CPU thread, training and inference, beside timm, Hugging Face and torchvision: seconds of CPU time.

    python -m benchmarks.bench_cpu [--model deit_tiny] [--batch 8] [--rounds 8] [--out FILE]

All ways run in one process, one call each in turn, the same weights, images and fp32; a way's time is the least of its
calls in CPU seconds of the process (`process_time`), which other users of the machine disturb less than the clock's,
and the clock's least stands beside it. A training step is forward, loss, backward, AdamW and average; before it counts,
its first step is compared with our eager model's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.bench_inference import LIMITS, images_of, make
from benchmarks.measuring.harness import Recorder, Refused
from benchmarks.measuring.train_steps import Job, compare, make_train_step, reference
from deitfast.errors import DeitfastError, first_line
from deitfast.model.work import full_name

OURS = "ours"
LIBRARIES = (OURS, "timm", "huggingface", "torchvision")


def least(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """(CPU seconds, seconds) of each call's fastest of `rounds`, in turn, after one call each that does not count."""
    found = {name: (float("inf"), float("inf")) for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            taken = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                found[name] = min(found[name][0], taken[0]), min(found[name][1], taken[1])
    return found


def training(model: str, batch: int) -> dict[str, Callable[[], object]]:
    """A checked training step of every library; ImportError where one is absent."""
    steps: dict[str, Callable[[], object]] = {}
    jobs = {name: Job(name, model, batch, "cpu", "fp32", engine="flat" if name == OURS else "") for name in LIBRARIES}
    expected = reference(jobs[OURS])
    for name, job in jobs.items():
        step = make_train_step(job)
        compare(step.first(), expected, "fp32")
        steps[name] = step
    return steps


def inference(model: str, batch: int) -> dict[str, Callable[[], object]]:
    """Logits of the same uint8 images by every library, checked against our eager model's."""
    images, calls = images_of(model, batch, "cpu"), dict[str, Callable[[], object]]()
    exact = make("ours, not fused", model, "cpu", torch.float32)[0](images)
    for name in LIBRARIES:
        way = make(name, model, "cpu", torch.float32)[0]
        if not (error := float((way(images) - exact).norm() / exact.norm())) <= LIMITS[torch.float32]:
            raise Refused(f"{name}: logits are off by {error:.1e}")
        calls[name] = partial(way, images)
    return calls


def rows_of(what: str, model: str, batch: int, found: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """A row a way. times_best_peer: of ours, in CPU seconds."""
    rows: list[dict[str, Any]] = []
    for name, (cpu, wall) in found.items():
        key = {"op": f"cpu {what}", "model": model, "batch": batch, "way": name}
        rows.append({"key": key, "cpu_ms_image": 1e3 * cpu / batch, "ms_image": 1e3 * wall / batch})
    rows[0]["times_best_peer"] = min(row["cpu_ms_image"] for row in rows[1:]) / rows[0]["cpu_ms_image"]
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a library is absent or its results differ, 2 for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8, help="calls of each way (default 8)")
    parser.add_argument("--out", metavar="FILE", help="results as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        model = full_name(options.model)
    except DeitfastError as error:
        print(f"bench_cpu: {error}", file=sys.stderr)
        return 2
    with Recorder(options.out, "cpu", "cpu") as recorder:
        try:
            for what, made in (("training", training), ("inference", inference)):
                found = least(made(model, options.batch), options.rounds)
                for row in rows_of(what, model, options.batch, found):
                    recorder.add(row)
                    ratio = f"  {row['times_best_peer']:.2f} x the best peer" if "times_best_peer" in row else ""
                    words = f"{row['cpu_ms_image']:9.1f} CPU ms an image {row['ms_image']:9.1f} ms"
                    print(f"{what:10} {row['key']['way']:12} {words}{ratio}", flush=True)
        except (ImportError, Refused) as problem:
            print(f"bench_cpu: {first_line(problem)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
