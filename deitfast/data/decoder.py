"""Where JPEGs are decoded: by nvJPEG on the GPU, or by libjpeg-turbo on the CPU with the batch copied over.

Which is faster depends on how many cores stand beside a GPU, so `auto` measures. The pixels of the two differ slightly:
whoever wants a run repeated bit for bit names one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch

from deitfast.data.dali import Feed, Runner, check_build, dali_version, decode_to_gpu, gathered, resize
from deitfast.data.manifest import Manifest
from deitfast.data.quarantine import Quarantine
from deitfast.errors import DeitfastError, first_line
from deitfast.verification.verdict import machine, remembered

_BATCH, _WARM_UP, _TIMED = 64, 3, 6
_LEVELS = 4.0
"""Of 255: how far the GPU's pixels may be from libjpeg's on average over an image. Decoders round, and upsample colour,
in their own ways, which the resize averages out; a wrong conversion, crop or stride is far beyond it."""


def choose_decoder(
    decode: str, manifest: Manifest, image_size: int, device: torch.device, threads: int, say: Callable[[str], None]
) -> str:
    """Where images for `device` are decoded, gpu or cpu, as Recipe.decode (gpu, cpu or auto) asks.

    For a CPU it is the CPU. A GPU decodes only if the first images of the split come out as by libjpeg; `auto` then
    measures both and says which was faster. Raises DeitfastError where `gpu` asks for what cannot be trusted.
    """
    if device.type == "cpu":
        if decode == "gpu":
            raise DeitfastError("--decode gpu needs a GPU, and this run is on the CPU. Use --decode cpu or auto")
        return "cpu"
    check_build(device)
    if decode == "cpu":
        return decode
    if problem := gpu_problem(manifest, image_size, device, threads):
        if decode == "gpu":
            raise DeitfastError(f"--decode gpu: {problem}. Give --decode cpu")
        say(f"decoding on the CPU: {problem}")
        return "cpu"
    if decode == "gpu":
        return decode
    try:
        speed = {where: _images_per_second(manifest, image_size, device, where, threads) for where in ("gpu", "cpu")}
    except (RuntimeError, DeitfastError) as error:
        say(f"decoding on the CPU: the GPU's decoder failed here ({first_line(error)})")
        return "cpu"
    chosen = max(speed, key=lambda where: speed[where])
    say(
        f"decoding on the {chosen.upper()}: measured {speed['gpu']:,.0f} images/s on the GPU and {speed['cpu']:,.0f} "
        f"on {threads} CPU threads (--decode gpu or cpu decides without measuring)"
    )
    return chosen


def gpu_problem(manifest: Manifest, image_size: int, device: torch.device, threads: int) -> str:
    """Why the GPU's decoder is not to be trusted with these images, in words; empty where it is."""
    n = min(_BATCH, len(manifest))
    images = [int(checksum) for checksum in manifest.checksum[:n]]
    key = {"dali": dali_version(), "images": images, "image_size": image_size, **machine(device)}

    def find() -> dict[str, Any]:
        try:
            of_gpu, of_cpu = (_pixels(manifest, image_size, device, where, threads) for where in ("gpu", "cpu"))
        except (RuntimeError, DeitfastError) as error:  # of DALI: no decoder for this GPU, not its libraries, no memory
            return {"problem": f"the GPU's decoder failed here ({first_line(error)})", "failed": True}
        off = (of_gpu.float() - of_cpu.float()).abs().flatten(1).mean(1)
        worst = int(off.argmax())
        if not float(off[worst]) > _LEVELS:
            return {"problem": ""}
        return {
            "problem": f"the GPU's decoder is not to be trusted: {manifest.name(worst)} is {float(off[worst]):.1f} of "
            f"255 levels off libjpeg's pixels on average, and {_LEVELS:g} is the most that rounding explains"
        }

    return str(remembered({"decoder": key}, find, keeps=lambda found: "failed" not in found)["problem"])


def _pixels(manifest: Manifest, image_size: int, device: torch.device, decoder: str, threads: int) -> torch.Tensor:
    """The first images of the split, uint8 (n, image_size, image_size, 3)."""
    runner, _ = _runner(manifest, image_size, device, decoder, threads, batches=1)
    with closing(runner):
        _, pixels = next(iter(runner))
        return pixels.clone()


def _images_per_second(manifest: Manifest, image_size: int, device: torch.device, decoder: str, threads: int) -> float:
    """Whole images decoded, resized and brought to the device, on the first images of the split."""
    runner, quarantine = _runner(manifest, image_size, device, decoder, threads, _WARM_UP + _TIMED)
    n = min(_BATCH, len(manifest))
    with closing(runner):
        batches = iter(runner)
        for _ in islice(batches, _WARM_UP):
            pass
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in batches:
            pass
        torch.cuda.synchronize(device)
        if quarantine.by_pil > n // 2:
            raise DeitfastError(f"DALI could not decode {quarantine.by_pil} of {n} images")
        return _TIMED * n / (time.perf_counter() - started)


def _runner(
    manifest: Manifest, image_size: int, device: torch.device, decoder: str, threads: int, batches: int
) -> tuple[Runner[Feed], Quarantine]:
    """What decodes, resizes and brings to the device the first images of the split; who knows the unreadable ones."""
    n = min(_BATCH, len(manifest))
    quarantine = Quarantine(manifest, 0, float("inf"), lambda _: None)

    def prepare(i: int) -> Feed:
        wanted = np.arange(i * n, (i + 1) * n) % len(manifest)
        index, encoded = quarantine.resolve(wanted)
        return Feed(distinct=index, encoded=[encoded[j] for j in index.tolist()], parameters=[])

    def graph(encoded: Any) -> list[Any]:
        return [resize(decode_to_gpu(encoded, decoder), [image_size, image_size])]

    def collect(_: Feed, outputs: Sequence[Any]) -> torch.Tensor:
        return gathered(outputs, np.arange(n), np.zeros(n, np.int64), device)

    runner: Runner[Feed] = Runner(
        quarantine, prepare, batches, graph, collect, parameters=0, max_batch=n, device=device, threads=threads
    )
    return runner, quarantine
