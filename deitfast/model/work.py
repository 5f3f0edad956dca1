"""A training step on paper: FLOPs, bytes and the least time of every op, from the model's sizes alone. No torch here.

Counted for one image: each op reads its inputs once and writes its outputs once, activations and weights in bf16 (2
bytes), weights and optimiser state shared by the images of a batch. A matrix product that ends in an epilogue (bias,
GELU and its derivative, residual) counts the epilogue's tensors and no pass of their own; LayerNorm counts as a pass.
An op's floor is the larger of FLOPs / matmul rate and bytes / bandwidth.

The last block is counted as it is computed: queries, projection and MLP of the class (and distillation) token alone.

Model FLOPs, the numerator of MFU, are three times the forward's, as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B), of a model all of whose blocks compute all tokens, as everybody counts them; the attention backward
computes its scores a second time, which the floor counts and MFU does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from deitfast.errors import DeitfastError, did_you_mean
from deitfast.model.zoo import VARIANTS, Variant, find_variant

IMAGENET_EPOCHS, IMAGENET_IMAGES, CLASSES = 300, 1_281_167, 1000


@dataclass(frozen=True)
class Gpu:
    """Datasheet rates: dense bf16 matrix products in TFLOP/s, memory in GB/s; and how many GB it has."""

    name: str
    tflops: float
    gbps: float
    gigabytes: float = 0.0


GPUS = {
    "a100": Gpu("A100 80 GB SXM", 312, 2039, 80),
    "h100": Gpu("H100 SXM", 989.4, 3350, 80),
    "h100-pcie": Gpu("H100 PCIe", 756, 2000, 80),
    "h200": Gpu("H200 SXM", 989.4, 4800, 141),
}
"""NVIDIA's datasheets, without sparsity."""


PARTS = ("GEMM forward", "GEMM dgrad", "GEMM wgrad", "attention", "norm", "optimiser", "input")
"""What the ops of a step are summed into."""


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


def _again(ops: list[Op]) -> list[Op]:
    """What the backward computes once more where the hidden layers of the MLPs are not kept."""
    hidden = [op for op in ops if op.name.removeprefix("last ") in ("fc1 forward", "LayerNorm forward")]
    return [replace(op, name=f"{op.name} again", count=op.count // (2 if op.part == "norm" else 1)) for op in hidden]


def step_ops(variant: Variant, batch: int, whole: bool = False, recompute: bool = False) -> list[Op]:
    """Every op of one training step, for one image of a batch. whole: as if the last block computed all tokens."""
    D, L, N, S = variant.width, variant.depth, variant.tokens, variant.image_size
    heads = 2 if variant.distilled else 1
    patches, pixels = N - heads, 3 * variant.patch_size**2
    ops = _block_ops(variant, batch, L if whole else L - 1, N)
    ops += [] if whole else _block_ops(variant, batch, 1, heads, "last ")
    ops += _again(ops) if recompute else []
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


def _variant(model: str | Variant) -> Variant:
    return find_variant(full_name(model)) if isinstance(model, str) else model


def _is_forward(op: Op) -> bool:
    return op.name.endswith(" forward") and op.part != "norm"


def forward_macs(model: str | Variant) -> float:
    """Multiply-adds of one image's forward pass: its matrix products, attention included."""
    return sum(op.count * op.flops for op in step_ops(_variant(model), 1, whole=True) if _is_forward(op)) / 2


def model_flops(model: str | Variant) -> float:
    """FLOPs that MFU counts for one trained image: three times the forward's."""
    return 6 * forward_macs(model)


def mfu(images_per_second: float, model: str | Variant, tflops: float) -> float:
    """Share of `tflops` that the model's FLOPs take, 0 to 1."""
    return images_per_second * model_flops(model) / (tflops * 1e12)


def hours_for_imagenet(images_per_second: float) -> float:
    """Hours for the paper's 300 epochs of ImageNet-1k."""
    return IMAGENET_EPOCHS * IMAGENET_IMAGES / images_per_second / 3600


def part_floors(
    model: str | Variant, batch: int, tflops: float, gbps: float, recompute: bool = False
) -> dict[str, float]:
    """Part of the budget -> floor in microseconds an image."""
    floors = dict.fromkeys(PARTS, 0.0)
    for op in step_ops(_variant(model), batch, recompute=recompute):
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
