"""The roofline on paper: FLOPs, bytes and the least time of every op of a training step. Needs no GPU.

    python -m benchmarks.roofline --model deit_base --gpu h100 [--batch 512] [--tflops X --gbps Y]

What is counted, and how: deitfast/model/work.py. Rates are the datasheet's unless given. For DeiT-B at batch 512 on an
H100 the plan stands beside the floor: the rate that each kernel is expected to reach, the kernels of the step's graph,
and what is built of the levers that would make it faster.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.measuring.counted import counted_launches
from deitfast.errors import DeitfastError
from deitfast.kernels.catalogue import Shape
from deitfast.model.work import (
    CLASSES,
    GPUS,
    IMAGENET_EPOCHS,
    PARTS,
    Gpu,
    Op,
    forward_macs,
    full_name,
    hours_for_imagenet,
    model_flops,
    part_floors,
    step_ops,
)
from deitfast.model.zoo import Variant, find_variant

# The plan ------------------------------------------------------------------------------------------------------------

PLANNED_MODEL, PLANNED_GPU, PLANNED_BATCH, PLANNED_US = "deit_base_patch16_224", GPUS["h100"], 512, 200.0
ACHIEVED: dict[str, tuple[float, str]] = {
    "qkv forward": (576, "TFLOP/s"),
    "proj forward": (458, "TFLOP/s"),
    "fc1 forward": (501, "TFLOP/s"),
    "fc2 forward": (618, "TFLOP/s"),
    "qkv dgrad": (660, "TFLOP/s"),
    "proj dgrad": (550, "TFLOP/s"),
    "fc1 dgrad": (680, "TFLOP/s"),
    "fc2 dgrad": (481, "TFLOP/s"),
    "qkv wgrad": (600, "TFLOP/s"),
    "proj wgrad": (500, "TFLOP/s"),
    "fc1 wgrad": (618, "TFLOP/s"),
    "fc2 wgrad": (618, "TFLOP/s"),
    "attention forward": (210, "TFLOP/s"),
    "attention backward": (186, "TFLOP/s"),
    "LayerNorm forward": (2200, "GB/s"),
    "LayerNorm backward": (2600, "GB/s"),
    "last kv forward": (576, "TFLOP/s"),
    "last kv dgrad": (660, "TFLOP/s"),
    "last kv wgrad": (600, "TFLOP/s"),
    "last LayerNorm forward": (2200, "GB/s"),
    "last LayerNorm backward": (2600, "GB/s"),
    "last attention forward": (1000, "GB/s"),
    "last attention backward": (1000, "GB/s"),
    "scale and sum": (2200, "GB/s"),
    "sums of columns": (560, "GB/s"),
    "AdamW, EMA, casts": (2700, "GB/s"),
    "uint8 to patches": (1500, "GB/s"),
    "patch forward": (385, "TFLOP/s"),
    "patch wgrad": (385, "TFLOP/s"),
}
"""What each kernel is expected to reach on an H100 SXM: estimates from its compiled machine code (instructions a tile
beside tensor-core cycles, loads in flight, programs that fit a multiprocessor), for cuBLAS and the patch product from
their size; of PyTorch's attention with one query a third of the bandwidth is believed. No measurement."""
SMALL_SHARE = 0.1
"""Of its floor's rate, what any other kernel reaches: the last block's few rows, heads, loss."""
NODE_US = 1.2
"""Between two kernels of a CUDA graph, believed: in microseconds a step."""
OTHER_NODES = 30
"""Kernels of a step beside the blocks and the gradients: input, embedding, head, loss, update."""


@dataclass(frozen=True)
class Lever:
    """Something faster that is built, or open. us: expected gain in microseconds an image, the lower end."""

    name: str
    part: str
    us: float
    built: bool


LEVERS = (
    Lever("row numbers in 32 bits, no 64-bit divisions in hot loops", "norm", 1.5, built=True),
    Lever("GEMMs persistent on sm_90, four stages, 128 x 256 for GELU too", "GEMM forward", 6.0, built=True),
    Lever("the MLP's incoming gradient read for its sums, not written again", "norm", 2.0, built=True),
    Lever("the same for the attention's half", "norm", 2.0, built=True),
    Lever("LayerNorm inside qkv's and fc1's product", "norm", 3.0, built=True),
    Lever("attention at three stages, loads issued together", "attention", 2.8, built=True),
    Lever("attention backward with S transposed, an entry on sm_90, not its default", "attention", 5.0, built=False),
    Lever("the last block's attention to its rows themselves, without keys and values", "attention", 2.0, built=False),
    Lever("LayerNorm backward: all loads before its sums over rows", "norm", 0.9, built=True),
    Lever("gradients gathered in one call, no addition each and no memset", "gaps", 1.4, built=True),
)
"""Expected from the same machine code, one by one. The last block for the prefix alone is in the counts above."""


def _extra_ops(variant: Variant) -> list[Op]:
    """What the step runs beside the least that must be done: passes that a lever removes, small sums."""
    tensor, whole_blocks = 2.0 * variant.tokens * variant.width, variant.depth - 1
    return [
        Op("scale and sum", "norm", 0.0, 2 * tensor, 2 * whole_blocks),
        Op("sums of columns", "norm", 0.0, 0.3 * tensor, whole_blocks),
    ]


def planned_us(op: Op) -> float:
    """Microseconds an image of all occurrences of `op`, at the rate its kernel is expected to reach."""
    if op.name not in ACHIEVED:
        return op.floor_us(PLANNED_GPU.tflops, PLANNED_GPU.gbps) / SMALL_SHARE
    rate, unit = ACHIEVED[op.name]
    return op.count * (op.flops / rate / 1e6 if unit == "TFLOP/s" else op.nbytes / rate / 1e3)


def graph_nodes(variant: Variant) -> int:
    """Kernels of one captured step: what a block launches, counted; its products by cuBLAS; an addition a gradient."""
    launches = counted_launches(Shape(variant.width, variant.heads, variant.tokens, PLANNED_BATCH))
    products = sum(op.part.startswith("GEMM") and not op.name.startswith("last ") for op in step_ops(variant, 1))
    ours = sum(count for kernel, count in launches.items() if "linear" in kernel)
    of_block = launches.total() + products - ours
    gradients = 0 if any(lever.built for lever in LEVERS if lever.part == "gaps") else 12 * variant.depth + 8
    return of_block * variant.depth + gradients + OTHER_NODES


@functools.cache
def plan() -> dict[str, float]:
    """Part -> microseconds an image of DeiT-B on an H100 at batch 512, of what is built. A plan, not a measurement."""
    variant = find_variant(PLANNED_MODEL)
    found = dict.fromkeys((*PARTS, "gaps"), 0.0)
    for op in step_ops(variant, PLANNED_BATCH) + _extra_ops(variant):
        found[op.part] += planned_us(op)
    found["gaps"] = NODE_US * graph_nodes(variant) / PLANNED_BATCH
    for lever in LEVERS:
        if lever.built and lever.part != "gaps":  # fewer nodes are counted, not estimated
            found[lever.part] -= lever.us
    return found


# The command ---------------------------------------------------------------------------------------------------------


def report(model: str, batch: int, gpu: Gpu) -> str:
    """The table of every op, the sums by part and, for DeiT-B at 224, the budget beside them."""
    name = full_name(model)
    variant = find_variant(name)
    ops = step_ops(variant, batch)
    lines = [
        f"{name}, batch {batch}, {gpu.name} ({gpu.tflops:g} TFLOP/s, {gpu.gbps:g} GB/s); an image at a time",
        f"{'op':26}{'part':14}{'count':>6}{'GFLOP':>10}{'MB':>10}{'bound':>9}{'floor us':>10}",
    ]
    for op in ops:
        gflop, megabytes = op.count * op.flops / 1e9, op.count * op.nbytes / 1e6
        bound, floor = op.bound(gpu.tflops, gpu.gbps), op.floor_us(gpu.tflops, gpu.gbps)
        lines.append(f"{op.name:26}{op.part:14}{op.count:6}{gflop:10.3f}{megabytes:10.3f}{bound:>9}{floor:10.3f}")
    floors = part_floors(name, batch, gpu.tflops, gpu.gbps)
    planned = plan() if name == PLANNED_MODEL and batch == PLANNED_BATCH and gpu == PLANNED_GPU else {}
    lines += ["", f"{'part':22}{'floor us':>10}" + (f"{'plan us':>10}{'share of roof':>15}" if planned else "")]
    for part, floor in floors.items():
        tail = f"{planned[part]:10.1f}{100 * floor / planned[part]:13.0f} %" if planned else ""
        lines.append(f"{part:22}{floor:10.2f}{tail}")
    total = sum(floors.values())
    if planned:
        lines.append(f"{'gaps':22}{0:10.2f}{planned['gaps']:10.1f}   {graph_nodes(variant)} kernels in the graph")
    lines.append(f"{'sum':22}{total:10.2f}" + (f"{sum(planned.values()):10.1f}" if planned else ""))
    lines += _levers_told(sum(planned.values())) if planned else []
    lines += [
        "",
        f"forward {forward_macs(name) / 1e9:.2f} G multiply-adds, training {model_flops(name) / 1e9:.1f} GFLOP an "
        f"image (3 x forward), {variant.parameters(CLASSES) / 1e6:.2f} M parameters",
        f"no step is faster than {1e6 / total:,.0f} images/s, {hours_for_imagenet(1e6 / total):.1f} hours for "
        f"{IMAGENET_EPOCHS} epochs of ImageNet-1k: a bound, not a measurement",
    ]
    return "\n".join(lines)


def _levers_told(total: float) -> list[str]:
    """What the plan counts as built, what is open, and how both stand to the goal."""
    lines = ["", "The plan is of what is built, from machine code and counts; nothing of it was measured. Levers:"]
    for lever in sorted(LEVERS, key=lambda lever: not lever.built):
        lines.append(f"  {'built' if lever.built else 'open: would give'} {lever.us:g} us  {lever.name} ({lever.part})")
    left = sum(lever.us for lever in LEVERS if not lever.built)
    verdict = "reached" if total <= PLANNED_US else "not reached"
    rest = f"with all that is open {total - left:.1f}"
    lines.append(f"goal {PLANNED_US:g} us an image, {verdict} on paper: {total:.1f}; {rest}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="deit_base", help="deit_tiny, deit_base_384, ... or a whole name")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="whose datasheet (default h100)")
    parser.add_argument("--batch", type=int, default=512, help="images that share weights and optimiser (default 512)")
    parser.add_argument("--tflops", type=float, help="matmul rate to use instead, such as a measured roof")
    parser.add_argument("--gbps", type=float, help="bandwidth to use instead")
    options = parser.parse_args(argv)
    sheet = GPUS[options.gpu]
    try:
        if min(options.batch, options.tflops or 1, options.gbps or 1) <= 0:
            raise DeitfastError("--batch, --tflops and --gbps must be positive")
        gpu = replace(sheet, tflops=options.tflops or sheet.tflops, gbps=options.gbps or sheet.gbps)
        print(report(options.model, options.batch, gpu))
    except DeitfastError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
