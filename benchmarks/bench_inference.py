"""Inference beside timm (eager, compiled, compiled with CUDA graphs) and Hugging Face: images/s and latency by batch.

    python -m benchmarks.bench_inference [--models deit_base deit_small deit_tiny] [--batches 1 8 64 256] [--out FILE]
    python -m benchmarks.bench_inference --device cpu --quick

Every way gets the same uint8 images on the device and gives logits: normalisation is part of what is timed, and of what
is compiled; its constants lie on the device. Weights are the same; all run with bf16 weights and activations (fp32 on
CPU). At small batches ours is a CUDA graph, and what stands beside it is `reduce-overhead`. Before a way is timed, its
logits are compared with those of our eager model in fp32, and one that differs gets no time. Every time is taken twice,
with all other ways between.

`ms` is the latency of one batch from the call to the last logit; `images_per_second` follows from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, Recorder, Refused, Timing, measure, synchronize, timed_row
from benchmarks.measuring.peers_models import build, logits_of, reference_state, version
from deitfast.data import IMAGENET_MEAN, IMAGENET_STD
from deitfast.errors import DeitfastError
from deitfast.model.work import forward_macs, full_name
from deitfast.model.zoo import find_variant
from deitfast.use.inference import Predictor

MODELS = ("deit_base", "deit_small", "deit_tiny")
BATCHES = (1, 8, 64, 256)
OURS = "ours"
REDUCE_OVERHEAD = "timm + compile reduce-overhead"
WAYS = (OURS, "timm", REDUCE_OVERHEAD, "timm + compile", "huggingface", "ours, no graph", "ours, not fused")
QUICK_WAYS = (OURS, "timm", "huggingface")
LIMITS = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest relative error of the logits against eager fp32."""

CHECKED_IMAGES = 8

Way = Callable[[Tensor], Tensor]
Options = argparse.Namespace


def library_of(way: str) -> str:
    return "ours" if way.startswith("ours") else way.split(" ")[0]


def make(way: str, model: str, device: str, dtype: torch.dtype) -> tuple[Way, str]:
    """uint8 images (m, S, S, 3) on the device to logits by `way`, and how it runs. ImportError where it is absent."""
    state = reference_state(model)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    if way in (OURS, "ours, no graph"):
        predictor = Predictor(build("ours", model, state).eval(), device, precision, graphs=way == OURS)
        return predictor, predictor.how
    net = _FromBytes(build(library_of(way), model, state), dtype).eval().to(device)
    mode = "reduce-overhead" if way == REDUCE_OVERHEAD else "default" if way.endswith("compile") else None
    run: Any = torch.compile(net, mode=mode, dynamic=False) if mode else net

    @torch.inference_mode()
    def call(images: Tensor) -> Tensor:
        return run(images)

    return call, f"{precision}, {f'torch.compile {mode}' if mode else 'eager'}"


class _FromBytes(torch.nn.Module):
    """uint8 images (m, S, S, 3) to logits by any library's model, in one module that can be compiled whole."""

    def __init__(self, net: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net.to(dtype), dtype
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale_shift", torch.stack([1 / (255 * std), -mean / std]))

    def forward(self, images: Tensor) -> Tensor:
        scale, shift = self.get_buffer("scale_shift")
        x = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return logits_of(self.net((x * scale + shift).to(self.dtype)))


def images_of(model: str, batch: int, device: str) -> Tensor:
    side = find_variant(model).image_size
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8).to(device)


def check(logits: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Raise Refused unless the logits agree with eager fp32."""
    error = float((logits.float().cpu() - exact).norm() / exact.norm())
    if logits.shape != exact.shape or not error <= LIMITS[dtype]:
        raise Refused(f"logits are off by {error:.1e} relative to eager fp32, limit {LIMITS[dtype]:.0e}")


def compare_ways(
    recorder: Recorder, model: str, batches: Sequence[int], ways: Sequence[str], options: Options, budget: Budget
) -> None:
    """Check and time every way at one model, and record a row for each batch."""
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    exact_way, _ = make("ours, not fused", model, options.device, torch.float32)
    calls: dict[str, tuple[Way, str]] = {}
    for way in ways:
        try:
            calls[way] = make(way, model, options.device, dtype)
        except ImportError as problem:
            key = {"op": "inference", "model": model, "way": way}
            _report(recorder, {"key": key, "absent": str(problem).splitlines()[0]})
    for batch in batches:
        keys: dict[str, dict[str, Any]] = {
            way: {"op": "inference", "model": model, "batch": batch, "way": way, "dtype": str(dtype).split(".")[1]}
            for way in calls
        }
        images = images_of(model, batch, options.device)
        exact = exact_way(images[:CHECKED_IMAGES]).float().cpu()
        runs: dict[str, list[Timing]] = {}
        for way in [*calls] * (1 if options.quick else 2):
            if way in runs and not runs[way]:
                continue  # it failed before
            call, first = calls[way][0], way not in runs
            timings = runs.setdefault(way, [])
            try:
                if not budget.fits(10.0 if options.quick else 20.0):
                    if first:
                        _report(recorder, {"key": keys[way], "skipped": f"no time left ({budget.left:.0f} s)"})
                    continue
                if first:
                    check(call(images)[:CHECKED_IMAGES], exact, dtype)  # compiles and captures, too
                timings.append(_time(call, images, options))
            except Refused as problem:
                _report(recorder, {"key": keys[way], "refused": str(problem)})
            except RuntimeError as problem:  # out of memory, a compilation that fails
                timings.clear()
                _report(recorder, {"key": keys[way], "failed": str(problem).splitlines()[0]})
        for way, timings in runs.items():
            if timings:
                _report(recorder, _timed(keys[way], timings, calls[way][1]))


def _timed(key: dict[str, Any], timings: Sequence[Timing], how: str) -> dict[str, Any]:
    row = timed_row(key, timings)
    row |= {"images_per_second": 1e3 * key["batch"] / row["ms"], "how": how, "version": version(library_of(key["way"]))}
    row["tflops"] = 2 * forward_macs(key["model"]) * key["batch"] / row["ms"] / 1e9
    return row


def _time(call: Way, images: Tensor, options: Options) -> Timing:
    def whole() -> None:
        call(images)
        synchronize(options.device)  # a latency: nobody has the logits before

    budget_ms, warmup = (100.0, 1) if options.quick else (1000.0, 5)
    return measure(whole, device=options.device, budget_ms=budget_ms, warmup=warmup, flush=False, most=200)


def _report(recorder: Recorder, row: dict[str, Any]) -> None:
    recorder.add(row)
    key = row["key"]
    label = f"{key['model']:24} {key.get('batch', ''):>4} {key['way']:30}"
    reason = next((kind for kind in ("refused", "failed", "absent", "skipped") if kind in row), None)
    if reason:
        print(f"{label} {reason}: {row[reason]}", flush=True)
    else:
        print(f"{label} {row['images_per_second']:10.1f} images/s {row['ms']:9.3f} ms  {row['how']}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a way was refused, 2 without the device or for a wrong name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_inference")
    arguments(parser)
    parser.add_argument("--models", nargs="+", help=f"default: {' '.join(MODELS)}; with --quick deit_tiny")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 64 256; with --quick 1 and 2")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all; with --quick ours, timm and huggingface")
    options = parser.parse_args(argv)
    if not ready("bench_inference", options.device):
        return 2
    try:
        models = [full_name(name) for name in options.models or (["deit_tiny"] if options.quick else MODELS)]
    except DeitfastError as error:
        print(f"bench_inference: {error}", file=sys.stderr)
        return 2
    batches = options.batches or ((1, 2) if options.quick else BATCHES)
    ways = options.ways or (QUICK_WAYS if options.quick else WAYS)
    budget = Budget(options.minutes)
    with Recorder(options.out, "inference", options.device, options.quick) as recorder:
        for model in models:
            torch.compiler.reset()
            compare_ways(recorder, model, batches, ways, options, budget)
        for row in recorder.refused:
            print(f"REFUSED {row['key']['model']} {row['key']['way']}: {row['refused']}", file=sys.stderr)
        return 1 if recorder.refused else 0


if __name__ == "__main__":
    sys.exit(main())
