"""The roofline on paper: FLOPs, bytes and the least time of every op of a training step. Needs no GPU.

    python -m benchmarks.roofline --model deit_base --gpu h100 [--batch 512] [--tflops X --gbps Y]

Counted for one image: each op reads its inputs once and writes its outputs once, activations and weights in bf16 (2
bytes), weights and optimiser state shared by the images of a batch. A matrix product that ends in an epilogue (bias,
GELU and its derivative, residual) counts the epilogue's tensors and no pass of their own; LayerNorm counts as a pass.
An op's floor is the larger of FLOPs / matmul rate and bytes / bandwidth. Rates are the datasheet's unless given.

The last block is counted as it is computed: queries, projection and MLP of the class (and distillation) token alone.
For DeiT-B at batch 512 on an H100 the plan stands beside the floor: the rate that each kernel is expected to reach, the
kernels of the step's graph, and what is built of the levers that would make it faster.

Model FLOPs, the numerator of MFU, are three times the forward's, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B), of a model all of whose blocks compute all tokens, as everybody counts them; the attention backward
computes its scores a second time, which the floor counts and MFU does not.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.measuring.counted import counted_launches
from deitfast.errors import DeitfastError, did_you_mean
from deitfast.kernels.catalogue import Shape
from deitfast.model.zoo import VARIANTS, Variant, find_variant

IMAGENET_EPOCHS, IMAGENET_IMAGES, CLASSES = 300, 1_281_167, 1000


@dataclass(frozen=True)
class Gpu:
    """Datasheet rates: dense bf16 matrix products in TFLOP/s, memory in GB/s."""

    name: str
    tflops: float
    gbps: float


GPUS = {
    "a100": Gpu("A100 80 GB SXM", 312, 2039),
    "h100": Gpu("H100 SXM", 989.4, 3350),
    "h100-pcie": Gpu("H100 PCIe", 756, 2000),
    "h200": Gpu("H200 SXM", 989.4, 4800),
}
"""NVIDIA's datasheets, without sparsity."""


PARTS = ("GEMM forward", "GEMM dgrad", "GEMM wgrad", "attention", "norm", "optimiser", "input")


@dataclass(frozen=True)
class Op:
    """One op of the step, as often as it occurs an image. flops, nbytes: of one occurrence, for one image."""

    name: str
    part: str
    flops: float
    nbytes: float
    count: int = 1

    def floor_us(self, tflops: float, gbps: float) -> float:
        """Least time of all occurrences, microseconds an image."""
        return self.count * max(self.flops / tflops / 1e6, self.nbytes / gbps / 1e3)

    def bound(self, tflops: float, gbps: float) -> str:
        return "compute" if self.flops / tflops >= 1e3 * self.nbytes / gbps else "memory"


def full_name(model: str) -> str:
    """`deit_tiny` -> `deit_tiny_patch16_224`, `deit_base_384` -> `deit_base_patch16_384`; whole names pass.

    Raises DeitfastError with the nearest name.
    """
    family, _, size = model.rpartition("_")
    for name in (model, f"{model}_patch16_224", f"{family}_patch16_{size}"):
        if name in VARIANTS:
            return name
    raise DeitfastError(f"model {model!r} unknown.{did_you_mean(model, VARIANTS) or ' `deitfast models` lists them.'}")


def short_name(model: str) -> str:
    """The inverse of `full_name`, for tables."""
    return model.replace("_patch16_224", "").replace("_patch16", "")


def _products(
    name: str, part: str, batch: int, rows: int, K: int, out: int, extra: float = 0, more: float = 0, count: int = 1
) -> list[Op]:
    """Forward, dgrad and wgrad of x (rows, K) W^T (K, out); extra and more: further elements forward, dgrad."""
    flops, weight, x, y = 2.0 * rows * K * out, K * out / batch, rows * K, rows * out
    return [
        Op(f"{name} forward", part or "GEMM forward", flops, 2 * (x + weight + y + extra), count),
        Op(f"{name} dgrad", part or "GEMM dgrad", flops, 2 * (y + weight + x + more), count),
        Op(f"{name} wgrad", part or "GEMM wgrad", flops, 2 * (y + x + weight), count),
    ]


def _block_ops(variant: Variant, batch: int, count: int, rows: int, last: str = "") -> list[Op]:
    """`count` blocks that compute `rows` tokens of an image, with keys and values of all of them."""
    D, N, product = variant.width, variant.tokens, partial(_products, part="", batch=batch, count=count)
    if rows == N:
        ops = product(f"{last}qkv", rows=N, K=D, out=3 * D)
    else:
        ops = product(f"{last}kv", rows=N, K=D, out=2 * D) + product(f"{last}q", rows=rows, K=D, out=D)
    ops += product(f"{last}proj", rows=rows, K=D, out=D, extra=rows * D)
    ops += product(f"{last}fc1", rows=rows, K=D, out=4 * D, extra=4 * rows * D)
    ops += product(f"{last}fc2", rows=rows, K=4 * D, out=D, extra=rows * D, more=4 * rows * D)
    statistics, kv = 4.0 * variant.heads * rows, 2 * N * D
    return [
        *ops,
        Op(f"{last}attention forward", "attention", 4.0 * rows * N * D, 2 * (kv + 2 * rows * D) + statistics, count),
        Op(f"{last}attention backward", "attention", 10.0 * rows * N * D, 4 * (kv + 2 * rows * D) + statistics, count),
        Op(f"{last}LayerNorm forward", "norm", 4.0 * (N + rows) * D, 2 * (N + rows) * D, 2 * count),
        Op(f"{last}LayerNorm backward", "norm", 7.0 * (N + rows) * D, 2 * 2 * (N + rows) * D, 2 * count),
    ]


def step_ops(variant: Variant, batch: int, whole: bool = False) -> list[Op]:
    """Every op of one training step, for one image of a batch. whole: as if the last block computed all tokens."""
    D, L, N, S = variant.width, variant.depth, variant.tokens, variant.image_size
    heads = 2 if variant.distilled else 1
    patches, pixels = N - heads, 3 * variant.patch_size**2
    ops = _block_ops(variant, batch, L if whole else L - 1, N)
    ops += [] if whole else _block_ops(variant, batch, 1, heads, "last ")
    read = N if whole else heads
    ops += [
        Op("final LayerNorm forward", "norm", 8.0 * read * D, 2 * 2 * read * D),
        Op("final LayerNorm backward", "norm", 14.0 * read * D, 2 * 4 * read * D),
    ]
    # Parameter, both moments and the average read and written, the gradient read (fp32); the bf16 copy written.
    ops.append(Op("AdamW, EMA, casts", "optimiser", 0.0, (4 * 2 * 4 + 4 + 2) * variant.parameters(CLASSES) / batch))
    patch, _, patch_wgrad = _products("patch", "input", batch, patches, pixels, D, D * heads)
    return [
        *ops,
        Op("uint8 to patches", "input", 0.0, 3 * S * S + 2 * patches * pixels),
        patch,
        patch_wgrad,
        *_products("head", "input", batch, 1, D, CLASSES, count=heads),
        Op("loss", "input", 0.0, 2 * 3 * CLASSES, heads),
    ]


def _is_forward(op: Op) -> bool:
    return op.name.endswith(" forward") and op.part != "norm"


def forward_macs(model: str) -> float:
    """Multiply-adds of one image's forward pass: its matrix products, attention included."""
    ops = step_ops(find_variant(full_name(model)), 1, whole=True)
    return sum(op.count * op.flops for op in ops if _is_forward(op)) / 2


def model_flops(model: str) -> float:
    """FLOPs that MFU counts for one trained image: three times the forward's."""
    return 6 * forward_macs(model)


def mfu(images_per_second: float, model: str, tflops: float) -> float:
    """Share of `tflops` that the model's FLOPs take, 0 to 1."""
    return images_per_second * model_flops(model) / (tflops * 1e12)


def hours_for_imagenet(images_per_second: float) -> float:
    """Hours for the paper's 300 epochs of ImageNet-1k."""
    return IMAGENET_EPOCHS * IMAGENET_IMAGES / images_per_second / 3600


def part_floors(model: str, batch: int, tflops: float, gbps: float) -> dict[str, float]:
    """Part of the budget -> floor in microseconds an image."""
    floors = dict.fromkeys(PARTS, 0.0)
    for op in step_ops(find_variant(full_name(model)), batch):
        floors[op.part] += op.floor_us(tflops, gbps)
    return floors


def gpu_of(device_name: str) -> Gpu | None:
    """The datasheet of the GPU that calls itself `device_name`, or None where there is none here."""
    upper = device_name.upper()
    if "H100" in upper and ("PCIE" in upper or "NVL" in upper):
        return GPUS["h100-pcie"] if "PCIE" in upper else None
    for key in ("h200", "h100"):
        if key.upper() in upper:
            return GPUS[key]
    return GPUS["a100"] if "A100" in upper and "80GB" in upper and "PCIE" not in upper else None


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
    Lever("GEMMs persistent, four stages, 128 x 256 tiles for GELU and its gradient", "GEMM forward", 6.0, built=False),
    Lever("no pass of its own for drop-path's factor and the bias sums", "norm", 4.0, built=False),
    Lever("LayerNorm inside qkv's and fc1's product", "norm", 3.0, built=False),
    Lever("attention at three stages, loads issued together", "attention", 2.8, built=False),
    Lever("attention backward with S transposed, P and dS in registers", "attention", 5.0, built=False),
    Lever("LayerNorm a row a warp; the backward's loads before its reductions", "norm", 2.0, built=False),
    Lever("gradients straight into the flat buffer, no addition each", "gaps", 1.4, built=False),
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
    launches = counted_launches(Shape(variant.width, variant.heads, variant.tokens, 16))
    products = sum(op.count for op in _block_ops(variant, 1, 1, variant.tokens) if op.part.startswith("GEMM"))
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
        gpu = Gpu(sheet.name, options.tflops or sheet.tflops, options.gbps or sheet.gbps)
        print(report(options.model, options.batch, gpu))
    except DeitfastError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
