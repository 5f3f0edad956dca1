"""Images a second of the input pipeline, stage by stage, beside timm's PIL loader on the same cores.

    python -m benchmarks.bench_loader --data IMAGENET [--out FILE]
    python -m benchmarks.bench_loader --device cpu --quick

decode                          every image whole, nothing else
decode + crop                   random resized crop and flip to uint8, one decode for the three views of an image
decode + crop, each             the same, a decode for each view
augmented, decode once          the loader: crop, flip and RandAugment to uint8, one decode for three views
augmented, decode each          the same, a decode for each view
augmented + prepared            `augmented, decode once`, then a step's input op: normalise, erase, mix, patches, fp32
timm (PIL)                      timm's loader with all of this, from the file to normalised batches, one process a core
timm (PIL), to uint8            the same without mixup, normalising and erasing: where ours hands over to the device
timm (PIL), no RandAugment      `timm (PIL)` without RandAugment

A view counts as an image. Beside the rate stands the rate per second of CPU time, of this process and its workers: on a
machine that does other things too it is the steadier measure. timm's posterize fails in Pillow 13 at 0 bits, which
`inc1` draws; in timm's rows it makes such an image black. With --device cuda our ways run three times: all on the CPU
("cpu"), decoded there with the rest on the GPU ("cpu, rest gpu"), and all on the GPU ("gpu"); none of them chooses for
itself. The packaged digits, the default, are a few pixels wide: they rehearse, and say nothing of JPEGs.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, Recorder, Timing, synchronize, timed_row
from deitfast.data import Manifest, TrainLoader, open_dataset
from deitfast.data.batch import prepare_patches
from deitfast.errors import DeitfastError
from deitfast.recipe import Recipe

Loader = Callable[[Manifest, "Setting"], Iterator[int]]
"""Yields the number of images of each batch as it is ready, without end."""


@dataclass(frozen=True)
class Place:
    """Where images are decoded (cpu or gpu), and the device on which all that follows runs."""

    decoder: str
    device: str


PLACES = {"cpu": Place("cpu", "cpu"), "cpu, rest gpu": Place("cpu", "cuda"), "gpu": Place("gpu", "cuda")}


class Setting:
    """What all loaders share. threads: cores or workers."""

    def __init__(self, place: Place, batch: int, image_size: int, threads: int) -> None:
        self.decoder, self.device = place.decoder, place.device
        self.batch, self.image_size, self.threads = batch, image_size, threads
        self.recipe = Recipe(data="bench", batch=batch, workers=threads, mix_group=batch, decode=place.decoder)


def dali_missing() -> str | None:
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:
        found = None
    return None if found else "nvidia-dali is not installed"


def decode_only(manifest: Manifest, setting: Setting) -> Iterator[int]:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from deitfast.data.dali import decode, decode_to_gpu

    device = torch.device(setting.device)
    order = itertools.cycle(range(len(manifest)))
    pipeline: Any = Pipeline(
        batch_size=setting.batch,
        num_threads=setting.threads,
        device_id=torch.cuda.current_device() if device.type == "cuda" else None,
        prefetch_queue_depth=2,
    )
    node = decode_to_gpu if device.type == "cuda" else decode
    with pipeline:
        encoded = fn.external_source(
            source=lambda: [manifest.read(i) for i in itertools.islice(order, setting.batch)],
            batch=True,
            dtype=types.DALIDataType.UINT8,
        )
        pipeline.set_outputs(node(encoded, setting.decoder))
    pipeline.build()
    while True:
        yield len(pipeline.run()[0])


def _ours(repeats: int, policy: bool, prepared: bool = False) -> Loader:
    def loader(manifest: Manifest, setting: Setting) -> Iterator[int]:
        recipe = replace(setting.recipe, repeats=repeats)
        if not policy:
            recipe = replace(recipe, rand_augment="none")
        with TrainLoader(
            manifest,
            recipe,
            setting.image_size,
            micro_batch=setting.batch,
            device=setting.device,
            stop_step=1_000_000,
        ) as batches:
            for batch in batches:
                images = prepare_patches(batch, recipe, 16) if prepared else batch.images
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


def _mend_posterize() -> None:
    """Let timm's posterize keep 0 bits as black; Pillow 13 refuses them."""
    from PIL import Image
    from timm.data import auto_augment

    theirs = auto_augment.posterize

    def posterize(image: Any, bits_to_keep: int, **options: Any) -> Any:
        return theirs(image, bits_to_keep, **options) if bits_to_keep > 0 else Image.new(image.mode, image.size)

    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is theirs:
            auto_augment.NAME_TO_OP[name] = posterize


def _timm(rand_augment: bool = True, to_uint8: bool = False) -> Loader:
    def loader(manifest: Manifest, setting: Setting) -> Iterator[int]:
        from tests.reference import import_timm

        timm, recipe = import_timm(), setting.recipe
        _mend_posterize()
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
            auto_augment=recipe.rand_augment if rand_augment else None,
            num_workers=setting.threads,
            collate_fn=None if to_uint8 else mixup,
            device=torch.device(setting.device),
            pin_memory=setting.device == "cuda",
        )
        if to_uint8:  # timm's PrefetchLoader, which normalises and erases, wraps the plain one
            batches = batches.loader
        while True:
            for images, _ in batches:
                yield len(images)

    return loader


OURS: dict[str, Loader] = {
    "decode": decode_only,
    "decode + crop": _ours(3, policy=False),
    "decode + crop, each": _ours(1, policy=False),
    "augmented, decode once": _ours(3, policy=True),
    "augmented, decode each": _ours(1, policy=True),
    "augmented + prepared": _ours(3, policy=True, prepared=True),
}
TIMM: dict[str, Loader] = {
    "timm (PIL)": _timm(),
    "timm (PIL), to uint8": _timm(to_uint8=True),
    "timm (PIL), no RandAugment": _timm(rand_augment=False),
}
GOALS = (
    ("decode + crop", "decode + crop, each", 1.25),
    ("augmented, decode once", "timm (PIL), to uint8", 1.5),
    ("augmented + prepared", "timm (PIL)", None),
)
"""Pairs that do the same work. On a CPU the first is to be so many times as fast as the second per CPU second."""
FIRST = ("augmented, decode once", "timm (PIL), to uint8")
"""What is worth most: the loader as training uses it, and what it stands beside."""
WARMUP, FEWEST = 5, 5
"""Batches before the clock starts, as many as are made ahead, and the fewest in an interval."""
QUICK = ("decode", "augmented, decode once", "augmented, decode each", "timm (PIL)")


def cpu_seconds() -> float:
    """CPU time so far of this process with all its threads, and of its live worker processes."""
    total = time.process_time()
    for process in multiprocessing.active_children():
        try:
            after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended, or there is no /proc
            continue
        total += (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime
    return total


def time_loader(
    batches: Iterator[int], device: str, seconds: float, warmup: int, runs: int
) -> tuple[list[Timing], int, float]:
    """Mean milliseconds a batch over intervals of `seconds` each after `warmup` batches; images and CPU ms a batch.

    The CPU time is that of the least interval: what else the machine does can only add to it.
    """
    images = max(itertools.islice(batches, warmup))
    timings, cpu = [], []
    for _ in range(runs):
        synchronize(device)
        start, count, cpu_before = time.perf_counter(), 0, cpu_seconds()
        while time.perf_counter() - start < seconds or count < FEWEST:
            images = next(batches)
            count += 1
        synchronize(device)
        ms = 1e3 * (time.perf_counter() - start) / count
        timings.append(Timing(ms, ms, ms, count))
        cpu.append(1e3 * (cpu_seconds() - cpu_before) / count)
    return timings, images, min(cpu)


def measure_way(name: str, manifest: Manifest, setting: Setting, quick: bool) -> dict[str, Any]:
    """The row of one loader, without its key."""
    loader = OURS.get(name) or TIMM[name]
    absent = dali_missing() if name in OURS else None
    if absent:
        return {"absent": absent}
    try:
        batches = loader(manifest, setting)
        try:
            seconds = 0.7 if quick else 3.0
            runs, images, cpu_ms = time_loader(batches, setting.device, seconds, WARMUP, 1 if quick else 2)
        finally:
            batches.close()  # type: ignore[attr-defined]
    except ImportError as problem:
        return {"absent": str(problem)}
    except Exception as problem:  # whatever a peer raises is that row's news, not the end of the run
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return {"failed": lines[-1].strip()[:300]}
    row = timed_row({}, runs)
    row |= {"images_per_second": 1e3 * images / row["ms"], "images_per_cpu_second": 1e3 * images / max(cpu_ms, 1e-3)}
    if name in TIMM and name != "timm (PIL), no RandAugment":
        row["note"] = "posterize to 0 bits made black: Pillow 13 refuses it"
    return row


def line(row: dict[str, Any]) -> str:
    key = row["key"]
    label = f"{key['way']:26} {key['decode']:13}"
    reason = next((kind for kind in ("failed", "absent", "skipped") if kind in row), None)
    if reason:
        return f"{label} {reason}: {row[reason]}"
    return f"{label} {row['images_per_second']:8.1f} images/s {row['images_per_cpu_second']:8.1f} a CPU second"


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One decode for three views against one for each, and ours against timm's, where both were measured."""
    rates = ("images_per_second", "images_per_cpu_second")
    measured = {(row["key"]["way"], row["key"]["decode"]): [row[r] for r in rates] for row in rows if "ms" in row}
    lines = []
    for decode, (ours, other, goal) in itertools.product(PLACES, GOALS):
        a, b = measured.get((ours, decode)), measured.get((other, "cpu" if other in TIMM else decode))
        if a and b:
            aim = f" (goal {goal})" if goal and decode == "cpu" else ""
            pair = f"{ours} ({decode}) against {other}"
            lines.append(f"{pair}: {a[1] / b[1]:.2f} x per CPU second{aim}, {a[0] / b[0]:.2f} x per second")
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
    if not ready("bench_loader", options.device):
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
    chosen = options.ways or (QUICK if options.quick else list(dict.fromkeys((*FIRST, *OURS, *TIMM))))
    with Recorder(options.out, "loader", options.device, options.quick) as recorder:
        recorder.note("data", {"name": os.path.basename(options.data.rstrip("/")), "images": len(manifest)})
        for way, (decode, place) in itertools.product(chosen, PLACES.items()):
            if way in TIMM:
                if decode != "cpu":
                    continue
                place = Place("cpu", options.device)  # PIL decodes, and timm's own batches go to the device
            if place.device != "cpu" and options.device == "cpu":
                continue
            setting = Setting(place, batch, options.image_size or (64 if options.quick else 224), options.threads)
            key = {"op": "loader", "way": way, "decode": decode, "batch": batch, "image_size": setting.image_size}
            key["threads"] = setting.threads
            if budget.fits(3 if options.quick else 12):
                recorder.add(measure_way(way, manifest, setting, options.quick) | {"key": key})
            else:
                recorder.add({"key": key, "skipped": f"no time left ({budget.left:.0f} s)"})
            print(line(recorder.rows[-1]), flush=True)
        print("\n".join(summary(recorder.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
