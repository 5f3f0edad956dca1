"""Questions whose answers decide what is built next, the cheapest first; each answer is a row, in words or in times.

    python -m benchmarks.questions [--only wgrad ...] [--out FILE]
    python -m benchmarks.questions --device cpu --quick

synchronise    does another thread's cudaDeviceSynchronize break a capture that is under way? (A loader's library may
               call it at any time; if it does, nothing of a loader may run beside the capture of a step.)
nccl           do an all-reduce inside a graph, and the end of its process group, work and return, at one process?
wgrad          does a product over a hundred thousand rows in bf16 round its partial sums to bf16, and what does it cost
               not to? Times, and distances from float64.
fc1 tile       MLP's first product with GELU at 128 x 128 and at 128 x 256: is it bound by the L2 cache?
attention      the attention kernels at one to three stages: do loads that run further ahead hide their latency?
decoders       how far are the pixels of each decoder from PIL's, for each kind of JPEG?

The first two run in processes of their own, because a capture that fails spoils its process. On CPU what needs a GPU
says so, and the rest is checked and not timed.

Exit status 1 where a result is wrong, 2 without the device.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring.command import arguments, last_json, ready, run_limited
from benchmarks.measuring.harness import Budget, Recorder, Refused, in_turns, rotating, timed_row
from benchmarks.measuring.record import ROOT
from benchmarks.tune import Trial
from benchmarks.workshop import Site, sites
from deitfast.errors import first_line
from deitfast.kernels.catalogue import Draw
from deitfast.kernels.common import architecture
from deitfast.kernels.tunable import Pick, described

Row = dict[str, Any]
CHILD_SECONDS = 60.0


# Captures, each in a process of its own ------------------------------------------------------------------------------


def synchronise_in_a_capture() -> str:
    """Another thread waits for the device while this one captures, in the mode that training uses."""
    x, stream, told = torch.zeros(1024, device="cuda"), torch.cuda.Stream(), []
    with torch.cuda.stream(stream):
        x.add_(1)
    torch.cuda.synchronize()

    def other() -> None:
        try:
            torch.cuda.synchronize()
            told.append("returned")
        except RuntimeError as problem:
            told.append(f"failed ({first_line(problem)})")

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            x.add_(1)
        graph.replay()
        torch.cuda.synchronize()
        ended = f"the capture held, and its replay gave {float(x[0]):g} (right: 2)"
    except RuntimeError as problem:
        ended = f"the capture broke: {first_line(problem)}"
    return f"the other thread's call {told[0]}; {ended}"


def nccl_in_a_graph() -> str:
    """An all-reduce of one process in a graph, replayed; then the group ends after the graph, as training does it."""
    from torch import distributed

    device = torch.device("cuda", torch.cuda.current_device())
    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1, device_id=device)
    x, stream = torch.ones(1024, device=device), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        distributed.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work = distributed.all_reduce(x, async_op=True)
        work.wait()
        x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    value = float(x[0])
    graph.reset()
    began = time.monotonic()
    distributed.destroy_process_group()
    return f"the replay gave {value:g} (right: 2), the group ended in {time.monotonic() - began:.1f} s"


CHILDREN = {"synchronise": synchronise_in_a_capture, "nccl": nccl_in_a_graph}


def ask_child(question: str, device: str, quick: bool) -> Iterator[Row]:
    if device != "cuda":
        yield {"key": key(question), "skipped": "needs a GPU"}
        return
    finished = run_limited([sys.executable, "-m", "benchmarks.questions", "--child", question], CHILD_SECONDS)
    told = last_json(finished.out) if finished.status == 0 else None
    yield {"key": key(question), **(told or {"failed": finished.problem})}


# Products and kernels ------------------------------------------------------------------------------------------------


def key(question: str, way: str = "") -> dict[str, str]:
    return {"op": "question", "question": question} | ({"way": way} if way else {})


def _weight_gradient(full: bool, tensors: tuple[Tensor, Tensor]) -> Tensor:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = not full
    dout, x = tensors
    return dout.T @ x


def wgrad(question: str, device: str, quick: bool) -> Iterator[Row]:
    """fc1's weight gradient of DeiT-B at 512 images, with partial sums that may be bf16 (torch's default) and fp32."""
    rows, outputs, inputs = (512, 64, 32) if quick else (512 * 197, 3072, 768)

    def make() -> tuple[Tensor, Tensor]:
        draw = Draw(0, torch.bfloat16, device)
        return draw.normal(rows, outputs, std=1e-3), draw.activations(rows, inputs)

    allowed = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    calls = {"bf16 sums allowed": partial(_weight_gradient, False), "fp32 sums": partial(_weight_gradient, True)}
    try:
        sets = rotating(make, device)
        dout, x = sets[0]
        exact = dout.double().T @ x.double()
        errors = {way: float((call(sets[0]) - exact).norm() / exact.norm()) for way, call in calls.items()}
        del exact
        found = in_turns(calls, device=device, sets=sets, budget_ms=10.0 if quick else 200.0)
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed
    for way, ran in found.items():
        answer = f"relative distance from float64 {errors[way]:.2e}"
        if ran.problem:
            yield {"key": key(question, way), "failed": ran.problem, "answer": answer}
        else:
            yield timed_row(key(question, way), ran.timings) | ran.how | {"answer": answer}


def _arch(device: str) -> int:
    return architecture(torch.empty(0, device=device)) if device == "cuda" else 90


def at_site(question: str, site: Site, candidates: Sequence[Pick], device: str) -> Iterator[Row]:
    """Each launch of a kernel: checked against float64, then timed twice in turn with the others."""
    trial, right = Trial(site, _arch(device), device), []
    for candidate in candidates:
        try:
            trial.check(candidate)
            right.append(candidate)
        except Refused as problem:
            yield {"key": key(question, described(candidate)), "refused": str(problem)}
        except Exception as problem:  # a launch that does not compile or does not fit is an answer, too
            yield {"key": key(question, described(candidate)), "failed": first_line(problem)}
    if device != "cuda":
        answer = "right; not timed on CPU"
        yield from ({"key": key(question, described(candidate)), "answer": answer} for candidate in right)
        return
    runs: dict[str, list[Any]] = {}
    for candidate in right * 2:
        runs.setdefault(described(candidate), []).append(trial.time(candidate, 100))
    for name, timings in runs.items():
        yield timed_row(key(question, name), timings) | {"answer": site.name}


def _site(op: str, words: str, quick: bool) -> Site:
    found = [site for site in sites(1 if quick else 512) if site.op == op and f"{words} " in site.name]
    return next(site for site in found if site.shape.model == ("Ti" if quick else "B"))


def fc1_tile(question: str, device: str, quick: bool) -> Iterator[Row]:
    site = _site("gemm", "gelu", quick)
    wanted = {(128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4)}
    chosen = []
    for launch in site.candidates(_arch(device)):
        sizes = [launch.tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")] if launch else []
        if launch and (*sizes, launch.num_warps, launch.num_stages) in wanted:
            chosen.append(launch)
    yield from at_site(question, site, chosen, device)


def attention_stages(question: str, device: str, quick: bool) -> Iterator[Row]:
    arch = _arch(device)
    for kernel in ("bwd_short", "fwd_short"):
        site = _site("attention", kernel, quick)
        launch = site.selection(arch).own
        if launch is None:  # this chip's table sends the shape to another kernel
            yield {"key": key(question, kernel), "skipped": f"no launch of {kernel} in the table of sm_{arch}"}
            continue
        candidates = [replace(launch, num_stages=stages) for stages in (1, 2, 3)]
        yield from at_site(f"{question} {kernel}", site, candidates, device)


# Decoders ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": 2},
    "4:4:4": {"subsampling": 0},
    "progressive": {"subsampling": 2, "progressive": True},
    "grey": {"subsampling": 0, "mode": "L"},
    "CMYK": {"mode": "CMYK"},
}


def decoders(question: str, device: str, quick: bool) -> Iterator[Row]:
    """One photo as every kind of JPEG: the pixels of DALI's decoders beside those of PIL, which is libjpeg-turbo."""
    from PIL import Image

    photo = Image.open(ROOT / "docs" / "attention.jpg").convert("RGB")
    for decoder in ("cpu", "gpu"):
        for kind, options in KINDS.items():
            row_key = key(question, f"{decoder}, {kind}")
            if decoder == "gpu" and device != "cuda":
                yield {"key": row_key, "skipped": "needs a GPU"}
                continue
            encoded = io.BytesIO()
            photo.convert(options.get("mode", "RGB")).save(
                encoded, "JPEG", quality=90, **{name: value for name, value in options.items() if name != "mode"}
            )
            try:
                pixels = _decoded(encoded.getvalue(), decoder)
                difference = np.abs(pixels.astype(int) - np.asarray(Image.open(encoded).convert("RGB"), int))
            except (ImportError, RuntimeError, ValueError) as problem:  # ValueError: another shape
                yield {"key": row_key, "failed": first_line(problem)}
                continue
            answer = f"largest difference {difference.max()}, mean {difference.mean():.2f} of 255"
            yield {"key": row_key, "answer": answer}


def _decoded(encoded: bytes, decoder: str) -> np.ndarray:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from deitfast.data.dali import decode

    on_gpu = decoder == "gpu"
    pipeline: Any = Pipeline(batch_size=1, num_threads=1, device_id=torch.cuda.current_device() if on_gpu else None)
    with pipeline:
        source = fn.external_source(
            source=lambda: [np.frombuffer(encoded, np.uint8)], batch=True, dtype=types.DALIDataType.UINT8
        )
        pipeline.set_outputs(decode(source, decoder))
    pipeline.build()
    (images,) = pipeline.run()
    return np.array((images.as_cpu() if on_gpu else images).at(0))


# The command ---------------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[str, str, bool], Iterator[Row]]] = {
    "synchronise": ask_child,
    "nccl": ask_child,
    "wgrad": wgrad,
    "fc1 tile": fc1_tile,
    "attention": attention_stages,
    "decoders": decoders,
}


def line(row: Row) -> str:
    label = f"{row['key']['question']:20} {row['key'].get('way', ''):52}"
    reason = next((kind for kind in ("refused", "failed", "skipped") if kind in row), None)
    if reason:
        return f"{label} {reason}: {row[reason]}"
    return f"{label} {'' if 'ms' not in row else format(row['ms'], '.4f') + ' ms  '}{row['answer']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=(__doc__ or "").split("\n")[0])
    arguments(parser, minutes=2.0)
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS), help="default: all")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not ready("questions", options.device):
        return 2
    if options.child:
        answer = CHILDREN[options.child]()
        print("\n" + json.dumps({"answer": answer}), flush=True)
        return 0
    budget = Budget(options.minutes)
    with Recorder(options.out, "questions", options.device, options.quick) as recorder:
        for question in options.only:
            if not budget.fits(5):
                recorder.add({"key": key(question), "skipped": "no time left"})
                print(line(recorder.rows[-1]), flush=True)
                continue
            try:
                for row in QUESTIONS[question](question, options.device, options.quick):
                    recorder.add(row)
                    print(line(row), flush=True)
            except Exception as problem:  # one question's trouble is not the next one's
                recorder.add({"key": key(question), "failed": first_line(problem)})
                print(line(recorder.rows[-1]), flush=True)
        return 1 if recorder.refused else 0


if __name__ == "__main__":
    sys.exit(main())
