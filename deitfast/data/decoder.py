"""Where JPEGs are decoded: by nvJPEG on the GPU, or by libjpeg-turbo on the CPU with the batch copied over.

Which is faster depends on how many cores stand beside a GPU, so `auto` measures. The pixels of the two differ slightly:
whoever wants a run repeated bit for bit names one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from deitfast.data.dali import Feed, Runner, check_build, decode_to_gpu, gathered, resize
from deitfast.data.manifest import Manifest
from deitfast.data.quarantine import Quarantine
from deitfast.errors import DeitfastError, first_line

_BATCH, _WARM_UP, _TIMED = 64, 3, 6


def choose_decoder(
    decode: str, manifest: Manifest, image_size: int, device: torch.device, threads: int, say: Callable[[str], None]
) -> str:
    """Where images for `device` are decoded, gpu or cpu, as Recipe.decode (gpu, cpu or auto) asks.

    For a CPU it is the CPU. `auto` decodes the first images of the split both ways and says which was faster, or that
    the GPU cannot.
    """
    if device.type == "cpu":
        if decode == "gpu":
            raise DeitfastError("--decode gpu needs a GPU, and this run is on the CPU. Use --decode cpu or auto")
        return "cpu"
    check_build(device)
    if decode != "auto":
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


def _images_per_second(manifest: Manifest, image_size: int, device: torch.device, decoder: str, threads: int) -> float:
    """Whole images decoded, resized and brought to the device, on the first images of the split."""
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
        quarantine,
        prepare,
        _WARM_UP + _TIMED,
        graph,
        collect,
        parameters=0,
        max_batch=n,
        device=device,
        threads=threads,
    )
    try:
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
    finally:
        runner.close()
