"""Images a second of the input pipeline, stage by stage, beside timm's PIL loader on the same cores.

    python -m benchmarks.bench_loader --data IMAGENET [--out FILE]
    python -m benchmarks.bench_loader --device cpu --quick

decode                          every image whole, nothing else
decode + crop                   random resized crop and flip, to uint8
augmented, decode once          all of the training augmentation, one decode for the three views of an image
augmented, decode each          the same, a decode for each view
timm (PIL)                      timm's loader with the same augmentation, one process a core
timm (PIL), RandAugment         the same with the recipe's RandAugment, which ours does not apply yet

A view counts as an image. With --device cuda the first four run twice, decoding on the CPU and on the GPU ("mixed").
The packaged digits, the default, are a few pixels wide: they rehearse, and say nothing of JPEGs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import Budget, Recorder, Timing, synchronize, timed_row
from benchmarks.micro import arguments, device_missing
from deitfast.data import Manifest, TrainLoader, open_dataset, prepare
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe

Loader = Callable[[Manifest, "Setting"], Iterator[int]]
"""Yields the number of images of each batch as it is ready, without end."""


class Setting:
    """What all loaders share. device: where decoded images go and augmentation runs; threads: cores or workers."""

    def __init__(self, device: str, batch: int, image_size: int, threads: int) -> None:
        self.device, self.batch, self.image_size, self.threads = device, batch, image_size, threads
        self.recipe = Recipe(data="bench", batch=batch, workers=threads, mix_group=batch)


def dali_missing() -> str | None:
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    return None if found else "nvidia-dali is not installed"


def decode_only(manifest: Manifest, setting: Setting) -> Iterator[int]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from deitfast.data.pipeline import decode

    device = torch.device(setting.device)
    order = itertools.cycle(range(len(manifest)))
    pipeline: Any = Pipeline(
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=torch.cuda.current_device() if device.type == "cuda" else None,
        prefetch_queue_depth=2,
    )
    with pipeline:
        encoded = fn.external_source(
            source=lambda: [manifest.read(i) for i in itertools.islice(order, setting.batch)],
            batch=True,
            dtype=types.DALIDataType.UINT8,
        )
        pipeline.set_outputs(decode(encoded, device))
    pipeline.build()
    while True:
        yield len(pipeline.run()[0])


def _ours(repeats: int, augmented: bool) -> Loader:
    def loader(manifest: Manifest, setting: Setting) -> Iterator[int]:
        recipe = replace(setting.recipe, repeats=repeats)
        with TrainLoader(
            manifest,
            recipe,
            setting.image_size,
            micro_batch=setting.batch,
            device=setting.device,
            stop_step=1_000_000,
        ) as batches:
            for batch in batches:
                images = prepare(batch, recipe)[0] if augmented else batch.images
                yield len(images)

    return loader


class _PilDataset(torch.utils.data.Dataset):
    """A manifest's images through PIL, as timm's datasets read them."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.transform = manifest, None

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        image: Any = Image.open(io.BytesIO(self.manifest.read(i).tobytes())).convert("RGB")
        return image if self.transform is None else self.transform(image), int(self.manifest.label[i])


def _timm(rand_augment: str | None) -> Loader:
    def loader(manifest: Manifest, setting: Setting) -> Iterator[int]:
        from tests.reference import import_timm

        timm, recipe = import_timm(), setting.recipe
        mixup = timm.data.FastCollateMixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            label_smoothing=recipe.smoothing,
            num_classes=max(len(manifest.classes), 2),
        )
        batches = timm.data.create_loader(
            _PilDataset(manifest),
            input_size=(3, setting.image_size, setting.image_size),
            batch_size=setting.batch,
            is_training=True,
            re_prob=recipe.erase,
            re_mode="pixel",
            interpolation="bicubic",
            auto_augment=rand_augment,
            num_workers=setting.threads,
            collate_fn=mixup,
            device=torch.device(setting.device),
            pin_memory=setting.device == "cuda",
        )
        while True:
            for images, _ in batches:
                yield len(images)

    return loader


OURS: dict[str, Loader] = {
    "decode": decode_only,
    "decode + crop": _ours(1, augmented=False),
    "augmented, decode once": _ours(3, augmented=True),
    "augmented, decode each": _ours(1, augmented=True),
}
TIMM: dict[str, Loader] = {
    "timm (PIL)": _timm(None),
    "timm (PIL), RandAugment": _timm("rand-m9-mstd0.5-inc1"),
}
WARMUP, FEWEST = 5, 5
"""Batches before the clock starts, as many as are made ahead, and the fewest in an interval."""
QUICK = ("decode", "augmented, decode once", "augmented, decode each", "timm (PIL)")


def time_loader(
    batches: Iterator[int], device: str, seconds: float, warmup: int, runs: int
) -> tuple[list[Timing], int]:
    """Mean milliseconds a batch over intervals of `seconds` each, and images a batch, after `warmup` batches."""
    images = max(itertools.islice(batches, warmup))
    timings = []
    for _ in range(runs):
        synchronize(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or count < FEWEST:
            images = next(batches)
            count += 1
        synchronize(device)
        ms = 1e3 * (time.perf_counter() - start) / count
        timings.append(Timing(ms, ms, ms, count))
    return timings, images


def measure_way(name: str, manifest: Manifest, setting: Setting, quick: bool) -> dict[str, Any]:
    """The row of one loader, without its key."""
    loader = OURS.get(name) or TIMM[name]
    absent = dali_missing() if name in OURS else None
    if absent:
        return {"absent": absent}
    try:
        batches = loader(manifest, setting)
        try:
            runs, images = time_loader(batches, setting.device, 0.7 if quick else 5.0, WARMUP, 1 if quick else 2)
        finally:
            batches.close()  # type: ignore[attr-defined]
    except ImportError as problem:
        return {"absent": str(problem)}
    except Exception as problem:  # whatever a peer raises is that row's news, not the end of the run
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return {"failed": lines[-1].strip()[:300]}
    row = timed_row({}, runs)
    return row | {"images_per_second": 1e3 * images / row["ms"]}


def line(row: dict[str, Any]) -> str:
    key = row["key"]
    label = f"{key['way']:26} {key['decode']:6}"
    reason = next((kind for kind in ("failed", "absent", "skipped") if kind in row), None)
    return f"{label} {reason}: {row[reason]}" if reason else f"{label} {row['images_per_second']:10.1f} images/s"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Decode once against each view by itself, and against timm, where both were measured."""
    speed = {(row["key"]["way"], row["key"]["decode"]): row["images_per_second"] for row in rows if "ms" in row}
    lines = []
    for decode in ("cpu", "mixed"):
        ours = speed.get(("augmented, decode once", decode))
        for other in (("augmented, decode each", decode), ("timm (PIL)", "cpu")):
            if ours and other in speed:
                lines.append(f"decode once ({decode}): {ours / speed[other]:.2f} x {other[0]}")
    return lines


def open_images(data: str) -> Manifest:
    """The training split, or a folder that directly holds class folders."""
    try:
        found = open_dataset(data, "train", quiet=True).train
    except DeitfastError:
        found = open_dataset(data, "val", quiet=True).val
    assert found is not None
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2 without the device, or for data that cannot be opened."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_loader")
    arguments(parser)
    parser.add_argument("--data", default="digits", help="as for training; default: the packaged digits")
    parser.add_argument("--ways", nargs="+", choices=[*OURS, *TIMM], help="default: all")
    parser.add_argument("--batch", type=int, default=None, help="views a batch, a multiple of 6 (default 96)")
    parser.add_argument("--image-size", type=int, default=None, help="pixels (default 224; with --quick 64)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    options = parser.parse_args(argv)
    if device_missing("bench_loader", options.device):
        return 2
    batch = options.batch or (24 if options.quick else 96)
    try:
        if batch % 6 or batch < 6 or options.threads < 1:
            raise DeitfastError(f"--batch {batch} must be a multiple of 6 and --threads {options.threads} at least 1")
        manifest = open_images(options.data)
    except DeitfastError as error:
        print(f"bench_loader: {error}", file=sys.stderr)
        return 2
    budget = Budget(options.minutes)
    chosen = options.ways or (QUICK if options.quick else [*OURS, *TIMM])
    decodes = ("cpu", "mixed") if options.device == "cuda" else ("cpu",)
    with Recorder(options.out, "loader", options.device, options.quick) as recorder:
        recorder.note("data", {"name": os.path.basename(options.data.rstrip("/")), "images": len(manifest)})
        for decode, way in itertools.product(decodes, chosen):
            if decode == "mixed" and way in TIMM:
                continue
            setting = Setting(
                "cuda" if decode == "mixed" or (way in TIMM and options.device == "cuda") else "cpu",
                batch,
                options.image_size or (64 if options.quick else 224),
                options.threads,
            )
            key = {"op": "loader", "way": way, "decode": decode, "batch": batch, "image_size": setting.image_size}
            key["threads"] = setting.threads
            if budget.fits(3 if options.quick else 25):
                recorder.add(measure_way(way, manifest, setting, options.quick) | {"key": key})
            else:
                recorder.add({"key": key, "skipped": f"no time left ({budget.left:.0f} s)"})
            print(line(recorder.rows[-1]), flush=True)
        print("\n".join(summary(recorder.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
