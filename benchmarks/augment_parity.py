"""Our augmentation beside timm's and torchvision's PIL images, with the same draws; no times.

    python -m benchmarks.augment_parity --data IMAGENET [--limit N] [--device cuda]

First table: each operation by itself, on N real images of 224 x 224 and 161 x 243 pixels (every tenth gray), over the
whole range of magnitudes, with both signs and with both of RandAugment's scales ("inc1" and without). `host` is the
loader's way on a CPU; `eager` the kernels' reference; with --device cuda, `triton` the kernels. Each is compared with
timm's function (torchvision's and PIL's for grayscale and blur): the mean and the largest difference of values in
0..255, and the share that differ.

Second table: what the loader yields beside timm's whole transform (`create_transform`), whose crop, flip and operations
are forced to be the loader's. The resize differs from PIL's by its rounding and nothing else; an operation such as
posterize makes the difference of one level large, so the last row has no limit on its largest difference.

Exit status 1 where a difference is over its limit: none at all in the first table and for the operations on the same
pixels; after crop, resize and flip a mean of .3 and 32 at most.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.bench_loader import open_images
from benchmarks.measuring.command import ready
from deitfast.data import Manifest, TrainLoader, draws
from deitfast.data import cpu_ops as host_ops
from deitfast.data.augmentation import FILL, Augmentation, plan
from deitfast.data.augmentation_draws import OPS, AugmentationDraws, level
from deitfast.errors import DeitfastError
from deitfast.kernels.image_ops import image_ops, image_ops_reference
from deitfast.recipe import Recipe
from tests import augment_reference
from tests.reference import import_timm

SIZES = ((224, 224), (161, 243))
"""Height and width of the images of the first table."""

Way = Callable[[np.ndarray, AugmentationDraws], np.ndarray]


@dataclass(frozen=True)
class Limit:
    """The largest differences allowed: mean and any, in levels of 0..255, and the share of values that differ."""

    mean: float = 0.0
    most: float = 0.0
    share: float = 0.0


EXACT = Limit()
RESIZED = Limit(mean=0.3, most=32, share=1)
WHOLE = Limit(mean=0.3, most=255, share=1)


class Difference:
    """Mean, largest and share of non-zero differences of the uint8 arrays added so far."""

    def __init__(self) -> None:
        self.total, self.most, self.off, self.count = 0, 0, 0, 0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        apart = np.abs(ours.astype(np.int16) - theirs)
        self.total += int(apart.sum(dtype=np.int64))
        self.most = max(self.most, int(apart.max(initial=0)))
        self.off += int(np.count_nonzero(apart))
        self.count += apart.size

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)

    @property
    def share(self) -> float:
        return self.off / max(self.count, 1)

    def within(self, limit: Limit) -> bool:
        return self.mean <= limit.mean and self.most <= limit.most and self.share <= limit.share

    def text(self, limit: Limit) -> str:
        return f"{self.mean:9.6f} {self.most:4} {100 * self.share:9.5f} %{' ' if self.within(limit) else '!'}"


def ways(device: str) -> dict[str, Way]:
    """What the first table compares, by name."""

    def planned(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], on: str = "cpu") -> Way:
        def way(images: np.ndarray, drawn: AugmentationDraws) -> np.ndarray:
            steps = torch.from_numpy(plan(drawn, images.shape[2], images.shape[1]))
            return run(torch.from_numpy(images).to(on), steps.to(on)).cpu().numpy()

        return way

    found: dict[str, Way] = {
        "host": lambda images, drawn: host_ops.apply(images, drawn, FILL),
        "eager": planned(lambda images, steps: image_ops_reference(images, steps, FILL)),
    }
    if device == "cuda":
        found["triton"] = planned(lambda images, steps: image_ops(images, steps, FILL, blurs=True), "cuda")
    return found


def opened(manifest: Manifest, i: int) -> Image.Image:
    return Image.open(io.BytesIO(manifest.read(i).tobytes())).convert("RGB")


def test_images(manifest: Manifest, count: int) -> list[np.ndarray]:
    """`count` images spread over the manifest, a batch uint8 (m, H, W, 3) for each of `SIZES`."""
    chosen = np.linspace(0, len(manifest) - 1, count).astype(int).tolist()
    batches: list[list[np.ndarray]] = [[] for _ in SIZES]
    for n, i in enumerate(chosen):
        height, width = SIZES[n % len(SIZES)]
        image = opened(manifest, i).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert("L").convert("RGB") if n % 10 == 9 else image
        batches[n % len(SIZES)].append(np.asarray(image))
    return [np.stack(batch) for batch in batches if batch]


def spread(op: int, count: int) -> AugmentationDraws:
    """One slot of `op` at magnitudes from 0 to 10, alternating in sign and in scale."""
    i, magnitude = np.arange(count), np.linspace(0, 10, count)
    sign = np.where(i // 2 % 2, -1.0, 1.0)
    amounts = [level(np.full(count, op), magnitude, sign, increasing) for increasing in (True, False)]
    amount = np.where(i % 2, amounts[1], amounts[0])
    if OPS[op] == "blur":
        amount = 0.1 + 0.19 * magnitude
    return AugmentationDraws(np.full((count, 1), op), amount[:, None])


def compare_operations(manifest: Manifest, count: int, device: str) -> bool:
    """Print the first table; whether every difference is within its limit."""
    chosen, batches, fine = ways(device), test_images(manifest, count), True
    print(f"{'':15}" + "".join(f"{name:^27}" for name in chosen))
    print(f"{'operation':15}" + f"{'mean':>9} {'max':>4} {'differ':>11} " * len(chosen))
    for op in range(1, len(OPS)):
        differences = {name: Difference() for name in chosen}
        for images in batches:
            drawn = spread(op, len(images))
            theirs = augment_reference.apply(images, drawn)
            for name, way in chosen.items():
                differences[name].add(way(images, drawn), theirs)
        print(f"{OPS[op]:15}" + "".join(differences[name].text(EXACT) for name in chosen))
        fine &= all(differences[name].within(EXACT) for name in chosen)
    return fine


def timm_transform(
    size: int, notation: str | None, box: Sequence[int], mirrored: bool, drawn: AugmentationDraws
) -> Any:
    """timm's training transform up to uint8, with the crop, the flip and RandAugment's operations of one view."""
    import_timm()
    from timm.data import create_transform
    from timm.data.auto_augment import AugmentOp

    transform = create_transform(
        size, is_training=True, use_prefetcher=True, interpolation="bicubic", auto_augment=notation
    )
    crop, mirror, *rand, to_numpy = transform.transforms
    crop.get_params = lambda *_: tuple(box)
    mirror.p = float(mirrored)
    steps: list[Any] = []
    for op, amount in zip(drawn.ops[0].tolist(), drawn.amounts[0].tolist(), strict=True):
        if OPS[op] == "posterize" and amount == 0:  # black; Pillow 13 raises
            steps.append(lambda image: Image.new("RGB", image.size))
        elif op:
            step: AugmentOp = rand[0].ops[op - 1]
            whole = OPS[op] in ("posterize", "solarize", "solarize add")
            plain = step.level_fn is None
            steps.append(lambda image, step=step, args=() if plain else (int(amount) if whole else amount,):
                         step.aug_fn(image, *args, **step.kwargs))  # fmt: skip
    transform.transforms = [crop, mirror, *steps, to_numpy]
    return transform


def compare_loader(manifest: Manifest, count: int, device: str) -> bool:
    """Print the second table; whether every difference is within its limit."""
    batch = max(6, count // 6 * 6)
    recipe = Recipe(data="parity", batch=batch, mix_group=batch, workers=2)
    plain = replace(recipe, rand_augment="none")
    size, yielded = 224, {}
    for r in (recipe, plain):
        with TrainLoader(manifest, r, size, micro_batch=batch, device=device, stop_step=1) as loader:
            yielded[r] = next(iter(loader))
    whole, cropped = yielded[recipe], yielded[plain]
    index, view, epoch = whole.index.cpu().numpy(), whole.view.cpu().numpy(), int(whole.epoch)
    boxes = draws.random_resized_crop(manifest.width[index], manifest.height[index], index, epoch, view, recipe.seed)
    mirrored = draws.flip(index, epoch, view, recipe.seed)
    drawn = Augmentation(recipe, size, torch.device("cpu")).draw(index, epoch, view)
    none = replace(drawn, ops=np.zeros_like(drawn.ops))

    rows = {"crop, resize, flip": RESIZED, "RandAugment of the same pixels": EXACT, "all": WHOLE}
    differences = {name: Difference() for name in rows}
    ours, ours_cropped = whole.images.cpu().numpy(), cropped.images.cpu().numpy()
    differences["RandAugment of the same pixels"].add(ours, augment_reference.apply(ours_cropped, drawn))
    for s, i in enumerate(index.tolist()):
        image, box = opened(manifest, i), boxes[s].tolist()
        for name, notation, by, mine in (
            ("crop, resize, flip", None, none, ours_cropped),
            ("all", recipe.rand_augment, drawn, ours),
        ):
            theirs = timm_transform(size, notation, box, bool(mirrored[s]), by[s : s + 1])(image)
            differences[name].add(mine[s], np.asarray(theirs).transpose(1, 2, 0))
    print(f"\n{f'the loader on {device}, {len(index)} views':32}{'mean':>9} {'max':>4} {'differ':>11}")
    for name, limit in rows.items():
        print(f"{name:32}{differences[name].text(limit)}")
    return all(differences[name].within(limit) for name, limit in rows.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 where a difference is over its limit, 2 without the device or the data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.augment_parity", description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images, as for training")
    parser.add_argument("--limit", type=int, default=40, help="images of the first table, views of the second (40)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(argv)
    if not ready("augment_parity", options.device):
        return 2
    try:
        if options.limit < 2:
            raise DeitfastError(f"--limit {options.limit} must be at least 2")
        manifest = open_images(options.data)
    except DeitfastError as error:
        print(f"augment_parity: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    same = compare_operations(manifest, options.limit, options.device)
    same &= compare_loader(manifest, options.limit, options.device)
    print("within the limits" if same else "OUT OF TOLERANCE where marked !")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
