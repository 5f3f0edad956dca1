"""One update of all weights: the flat buffers' kernels beside the optimisers of torch and timm with a foreach EMA.

python -m benchmarks.bench_optimizer [--device cpu --quick] [--out FILE] [--minutes 4]

Every way clips the gradient's norm, updates fp32 weights, moves their average and, on a GPU, writes a bf16 copy of the
weights, from the same gradients (bf16 in the flat way on a GPU, fp32 everywhere else). First, three updates of every
way are compared with float64; one that is wrong gets no number. On a GPU replays of a CUDA graph are timed; a way that
cannot be captured is timed as the host launches it, beside the flat update launched so.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, Recorder, Refused, Roofs, in_turns, roofs, timed_row, verify
from benchmarks.measuring.peers_ops import PEER_FACTOR
from deitfast.engine.flat import FlatState
from deitfast.engine.optim import Ema, parameter_groups
from deitfast.model.factory import create_model
from deitfast.recipe import Recipe

MODELS = {"B": "deit_base_patch16_224", "S": "deit_small_patch16_224", "Ti": "deit_tiny_patch16_224"}
WAYS = {
    "adamw": ("flat", "torch fused", "torch foreach"),
    "lamb": ("flat", "timm foreach"),
    "sgd": ("flat", "torch fused", "torch foreach"),
}
FROM_HOST = "flat, from the host"
CHECKED = (1.0, -0.5, 2.0)
"""Factors of the gradient in the updates that are compared: exact in bf16, and unlike enough to show every term."""


@dataclass
class Way:
    """One way: `update(number)`, and the gradients, weights and averages it works on, in the model's order."""

    update: Callable[[int], None]
    grads: list[Tensor]
    weights: list[Tensor]
    average: list[Tensor]


def recipe(optimizer: str) -> Recipe:
    """Decays and rates large enough that three updates show every term."""
    return Recipe(optimizer=optimizer, lr=1e-2, clip_norm=0.1, weight_decay=0.05, ema_decay=0.9)


def parameters_of(name: str, device: str) -> nn.Module:
    """A model of `MODELS`, or for any other name two small layers."""
    torch.manual_seed(0)
    if name in MODELS:
        return create_model(MODELS[name], fused=False).to(device)
    return nn.Sequential(nn.Linear(192, 576), nn.LayerNorm(576), nn.Linear(576, 192)).to(device)


def gradients(model: nn.Module) -> list[Tensor]:
    """Of std 1e-3 and exact in bf16, so that every way sees the same numbers."""
    parameters = list(model.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(1)
    draws = [torch.randn(p.shape, generator=generator, device=p.device) for p in parameters]
    return [draw.mul_(1e-3).bfloat16().float() for draw in draws]


def flat_way(model: nn.Module, settings: Recipe, grads: list[Tensor]) -> Way:
    """FlatState's update."""
    device = grads[0].device
    flat = FlatState(model, settings, torch.bfloat16 if device.type == "cuda" else torch.float32)
    computed = list(flat.compute_model().parameters())
    starts = {id(parameter): start for parameter, start in flat.computed}
    own = [flat.outgoing[starts[id(p)] : starts[id(p)] + p.numel()].view(p.shape) for p in computed]
    torch._foreach_copy_(own, grads)
    scalars = [torch.from_numpy(flat.scalars(settings.lr, number)).to(device) for number in range(len(CHECKED))]
    names = [name for name, _ in model.named_parameters()]
    averages = flat.ema_tensors()
    return Way(
        lambda number: flat.update(scalars[number]),
        own,
        [parameter.detach() for parameter in model.parameters()],
        [averages[name] for name in names],
    )


def library_way(model: nn.Module, settings: Recipe, grads: list[Tensor], kind: str) -> Way:
    """torch's AdamW or SGD, or timm's Lamb, as a training loop calls them; `kind` is fused or foreach."""
    groups: Any = parameter_groups(model, settings.weight_decay)
    betas = (settings.beta1, settings.beta2)
    fused, foreach, on_cuda = kind == "fused", kind == "foreach", grads[0].is_cuda
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            groups, settings.lr, betas, settings.adam_eps, fused=fused, foreach=foreach, capturable=on_cuda
        )
    elif settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, settings.lr, settings.beta1, nesterov=True, fused=fused, foreach=foreach)
    else:
        from tests.reference import import_timm

        import_timm()  # where torchvision's operators are missing, timm's import needs help
        from timm.optim import Lamb

        optimizer = Lamb(
            groups, settings.lr, betas=betas, eps=settings.adam_eps, max_grad_norm=settings.clip_norm, foreach=foreach
        )
    parameters = list(model.parameters())
    ema = Ema(model, settings.ema_decay)
    copies = [p.detach().bfloat16() for p in parameters] if on_cuda else []
    own = [grad.to(p.dtype, copy=True) for p, grad in zip(parameters, grads, strict=True)]
    for parameter, grad in zip(parameters, own, strict=True):
        parameter.grad = grad

    def update(number: int) -> None:
        if settings.optimizer != "lamb":
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        ema.update(model)
        if copies:
            torch._foreach_copy_(copies, [p.detach() for p in parameters])

    return Way(update, own, [p.detach() for p in parameters], list(ema.tensors.values()))


def make_way(name: str, model: nn.Module, settings: Recipe, grads: list[Tensor]) -> Way:
    """The way called `name`, on a copy of the model."""
    model = copy.deepcopy(model)
    if name == "flat":
        return flat_way(model, settings, grads)
    return library_way(model, settings, grads, name.split()[1])


def changes(way: Way, start: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """What the first updates change in the weights and in their average, each as one vector."""
    for number, factor in enumerate(CHECKED):
        torch._foreach_copy_(
            way.grads, torch._foreach_mul(grads, factor)
        )  # clipping and torch's foreach SGD write into them
        way.update(number)
    pairs = {"weights": way.weights, "average": way.average}
    return {
        name: torch.cat([(new - old).flatten() for new, old in zip(tensors, start, strict=True)])
        for name, tensors in pairs.items()
    }


def time_model(
    optimizer: str, name: str, device: str, recorder: Recorder, roof: Roofs, budget_ms: float, graph: bool
) -> None:
    """Check and time every way of `optimizer` for one model, and record a row for each."""
    settings, model = recipe(optimizer), parameters_of(name, device)
    start, grads = [p.detach().clone() for p in model.parameters()], gradients(model)
    key = {"op": optimizer, "model": name, "dtype": "bfloat16" if device == "cuda" else "float32"}
    # Moments, weights and average are read and written, the gradient is read, the copy written.
    moments, gradient_and_copy = 1 if optimizer == "sgd" else 2, 4
    nbytes = sum(p.numel() for p in start) * (8.0 * (moments + 2) + gradient_and_copy)
    exact = changes(
        library_way(copy.deepcopy(model).double(), settings, grads, "foreach"), [t.double() for t in start], grads
    )
    eager_way = WAYS[optimizer][-1]
    eager = changes(make_way(eager_way, model, settings, grads), start, grads)
    present: dict[str, Way] = {}
    for way_name in WAYS[optimizer]:
        way = make_way(way_name, model, settings, grads)
        try:
            factor = 2.0 if way_name == "flat" else PEER_FACTOR
            for what, change in changes(way, start, grads).items():
                verify(f"{optimizer} {what}", change, exact[what], eager[what], factor)
            present[way_name] = way
        except (Refused, RuntimeError) as problem:
            report(recorder, {"key": {**key, "way": way_name}, "refused": str(problem).splitlines()[0]})
    del exact, eager
    updates = {way_name: partial(way.update, 0) for way_name, way in present.items()}
    found = in_turns(updates, device=device, budget_ms=budget_ms, graph=graph)
    if "flat" in found and found["flat"].launch == "graph" and any(ran.launch == "stream" for ran in found.values()):
        # What cannot be captured, for a norm that the host reads, say, is compared with ours launched the same way.
        ours = in_turns({FROM_HOST: updates["flat"]}, device=device, budget_ms=budget_ms, graph=False)
        found = {"flat": found.pop("flat")} | ours | found
    flat_ms = {}
    for way_name, ran in found.items():
        row_key = {**key, "way": way_name}
        if ran.problem is not None:
            report(recorder, {"key": row_key, "failed": ran.problem})
            continue
        row = timed_row(row_key, ran.timings, 0.0, nbytes, roof) | ran.how
        if way_name in ("flat", FROM_HOST):
            flat_ms[ran.launch] = row["ms"]
        elif ran.launch in flat_ms:
            row["fused_speedup"] = row["ms"] / flat_ms[ran.launch]
        report(recorder, row)


def report(recorder: Recorder, row: dict[str, Any]) -> None:
    """Record a row and print it in one line."""
    recorder.add(row)
    key = row["key"]
    label = f"{key['op']:6} {key['model']:6} {key['way']:19}"
    if reason := next((kind for kind in ("refused", "failed") if kind in row), None):
        print(f"{label} {reason}: {row[reason]}", flush=True)
        return
    speedup = f" flat {row['fused_speedup']:.2f}x" if "fused_speedup" in row else ""
    print(f"{label} {row['ms']:9.4f} ms {row['gbps']:7.1f} GB/s {row['roof_percent']:5.1f} % of the copy roof{speedup}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_optimizer", description=__doc__.split("\n")[0])
    arguments(parser, minutes=4.0)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), help="optimisers; default: all")
    parser.add_argument("--no-graph", action="store_true", help="time what the host launches, not a CUDA graph")
    options = parser.parse_args(argv)
    if not ready("bench_optimizer", options.device):
        return 2
    budget = Budget(options.minutes)
    with Recorder(options.out, "optimizer", options.device, options.quick) as recorder:
        roof = roofs(options.device, options.quick)
        recorder.note("roofs", asdict(roof))
        print(f"roof: {roof.gbps:.0f} GB/s")
        slowest = 0.0
        models = ["small"] if options.quick else options.models
        for optimizer, model in itertools.product(options.only, models):
            if not budget.fits(slowest):
                recorder.add({"key": {"op": optimizer, "model": model}, "skipped": "no time left"})
                print(f"{optimizer:6} {model:6} skipped: no time left")
                continue
            began = time.monotonic()
            budget_ms = 10.0 if options.quick else 200.0
            try:
                time_model(optimizer, model, options.device, recorder, roof, budget_ms, not options.no_graph)
            except ImportError as problem:  # timm, whose LAMB is the reference
                recorder.add({"key": {"op": optimizer, "model": model}, "absent": str(problem)})
                print(f"{optimizer:6} {model:6} absent: {problem}")
            slowest = max(slowest, time.monotonic() - began)
        for row in recorder.refused:
            print(f"REFUSED {row['key']['op']}: {row['refused']}", file=sys.stderr)
        return 1 if recorder.refused else 0


if __name__ == "__main__":
    sys.exit(main())
