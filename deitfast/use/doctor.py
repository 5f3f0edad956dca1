"""What on this machine would break a run, or slow it down, and what to do about it: `deitfast doctor`."""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from deitfast.compiler import missing_for_triton
from deitfast.data import Manifest, TrainLoader, open_dataset
from deitfast.data.cores import cores, thread_count
from deitfast.data.dali import check_build, dali_version
from deitfast.data.decoder import gpu_problem
from deitfast.errors import DeitfastError, first_line
from deitfast.model.factory import create_model
from deitfast.model.fused import question_about
from deitfast.recipe import Recipe
from deitfast.verification.verdict import Verdict, driver, machine
from deitfast.verification.verify import TRAINING_OPS, search, verify

OK, NOTE, BREAKS = "ok", "note", "breaks"
_GPU_CORES = 4
"""Cores a GPU that decoding for DeiT-B takes about: below, the GPU has to decode."""
_SHARED_MEMORY = 64 << 20
"""Docker's default for /dev/shm, in which NCCL's processes of one machine meet: too little for several GPUs."""
_SLOW_DISK = 100e6  # bytes a second: below, a checkpoint of DeiT-B (1.4 GB) holds training up for over ten seconds
_FULL_DISK = 10e9
_LOADING_SECONDS, _LOADED_AT_ONCE = 10.0, 32


@dataclass(frozen=True)
class Finding:
    """One thing about this machine. level: ok, note (slower, or missing where it is not needed), breaks (a run)."""

    level: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:6} {self.what}{f'. {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True)
class Examination:
    """All findings, and the verdict on the kernels; None where no GPU is. machine: what that verdict is about."""

    findings: list[Finding]
    kernels: Verdict | None
    machine: dict[str, str] = field(default_factory=dict)

    @property
    def breaks(self) -> bool:
        return any(finding.level == BREAKS for finding in self.findings)


def examine(
    model: str, batch: int, data: str, out: Path, say: Callable[[str], None], *, tune_minutes: float = 0
) -> Examination:
    """Look at everything. model, batch: what the kernels are verified for; data: images, or empty; out: for runs.

    tune_minutes: of a search of the kernels' launch constants; DeitfastError where it cannot be.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if tune_minutes and not gpus:
        raise DeitfastError("--tune searches on the GPU that the kernels run on, and there is none here. Leave it out")
    if tune_minutes < 0 or not math.isfinite(tune_minutes):
        raise DeitfastError(f"--tune is {tune_minutes:g} minutes. Give a number above 0")
    findings = [*_versions(), *_gpus(gpus), *_compiler(gpus), *_cores(max(gpus, 1)), *_disk(out), *_shared_memory(gpus)]
    findings += [*_nccl(gpus), *_dali(gpus), *_data(data, gpus)]
    if not gpus:
        words = "no table of kernels: they are verified on the GPU that they run on, and there is none here"
        return Examination([*findings, Finding(NOTE, words)], None)
    question, device = question_about(create_model(model), TRAINING_OPS, batch, torch.bfloat16), torch.device("cuda", 0)
    if tune_minutes:
        findings += _searched(search(question, device, say, tune_minutes))
    kernels = verify(question, device, say)
    return Examination([*findings, *_kernels(kernels)], kernels, machine(device))


def table(kernels: Verdict) -> str:
    """The verdict by op: what it runs as, the time of every form, why."""
    rows = [("op", "runs as", "ms: each form", "why")]
    for op in kernels.ops:
        rows.append((op.op, op.form, ", ".join(f"{form} {ms:.3f}" for form, ms in op.ms.items()), op.why))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"{'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))}  {row[3]}".rstrip()
        for row in rows
    )


def _versions() -> Iterator[Finding]:
    yield Finding(OK, f"Python {platform.python_version()}, torch {torch.__version__}")
    try:
        yield Finding(OK, f"triton {metadata.version('triton')}")
    except metadata.PackageNotFoundError:
        yield Finding(BREAKS, "triton is not installed", "pip install deitfast brings it on Linux")


def _gpus(gpus: int) -> Iterator[Finding]:
    known = driver()
    if not gpus:
        if known and torch.version.cuda is None:
            why = f"an NVIDIA driver ({known}) is here, but this torch is built for CPUs alone"
            yield Finding(BREAKS, why, "Install a torch with CUDA: pip install torch, without an index of CPU builds")
        elif known:
            why = f"torch, built for CUDA {torch.version.cuda}, finds no GPU under driver {known}"
            yield Finding(BREAKS, why, "Update the driver, look at nvidia-smi, or unset CUDA_VISIBLE_DEVICES")
        else:
            yield Finding(NOTE, "no GPU: everything runs on the CPU, in eager PyTorch")
        return
    for i in range(gpus):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Finding(OK, f"GPU {i}: {properties.name}, {memory}, sm_{properties.major}{properties.minor}")
        if properties.major < 8:
            remedy = "Give --precision fp32, or use an A100, RTX 30 or newer"
            yield Finding(BREAKS, f"GPU {i} has no bf16", remedy)
    yield Finding(OK, f"driver {known or 'unknown'}, CUDA {torch.version.cuda}")


def _compiler(gpus: int) -> Iterator[Finding]:
    missing = missing_for_triton()
    if not missing:
        yield Finding(OK, "a C compiler and Python.h are here, of which Triton builds its launcher")
    else:
        what, _, remedy = missing.partition(". ")
        yield Finding(BREAKS if gpus else NOTE, f"Triton builds a C module before its first kernel, and {what}", remedy)


def _cores(processes: int) -> Iterator[Finding]:
    mine = max(1, cores() // processes)
    what = f"{mine} core(s) a process, of {os.cpu_count()} in this machine"
    if mine < _GPU_CORES and torch.cuda.is_available():
        remedy = "Leave --decode at auto, reduce the images (deitfast data prepare --short-side), or give more cores"
        yield Finding(NOTE, f"{what}: too few to decode JPEGs for a GPU", remedy)
    else:
        yield Finding(OK, what)


def _disk(out: Path) -> Iterator[Finding]:
    where = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(where).free
    if free < _FULL_DISK:
        yield Finding(NOTE, f"{free / 1e9:.1f} GB are free for runs in {where}", "A run of DeiT-B keeps about 6 GB")
    try:
        speed = _write_speed(where)
    except OSError as error:
        yield Finding(BREAKS, f"runs cannot be written in {where}: {error.strerror}", "Give --out another folder")
        return
    what = f"{free / 1e9:,.0f} GB free in {where}, written and brought to the disk at {speed / 1e6:,.0f} MB/s"
    slow = speed < _SLOW_DISK
    remedy = "A checkpoint of DeiT-B takes over ten seconds: raise --save-minutes, or give --out a local disk"
    yield Finding(NOTE if slow else OK, what, remedy if slow else "")


def _write_speed(folder: Path, size: int = 32 << 20) -> float:
    """Bytes a second of a file that is written and brought to the disk."""
    path = folder / f".deitfast-doctor-{os.getpid()}"
    content = os.urandom(1 << 20) * (size >> 20)
    started = time.perf_counter()
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)


def _shared_memory(gpus: int) -> Iterator[Finding]:
    level = BREAKS if gpus > 1 else NOTE
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        yield Finding(level, "there is no /dev/shm", "Mount one: docker run --ipc=host")
        return
    what = f"/dev/shm has {size / 2**20:,.0f} MiB"
    if size > _SHARED_MEMORY:
        yield Finding(OK, what)
    else:
        yield Finding(level, what, "NCCL needs more for several GPUs: docker run --ipc=host, or --shm-size=1g")


def _nccl(gpus: int) -> Iterator[Finding]:
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        yield Finding(OK, f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, over which several GPUs train")
    else:
        level = BREAKS if gpus > 1 else NOTE
        yield Finding(level, "this torch has no NCCL, over which several GPUs train", "Install torch from PyPI")


def _dali(gpus: int) -> Iterator[Finding]:
    try:
        if gpus:
            check_build(torch.device("cuda"))
        yield Finding(OK, f"DALI {dali_version()}, for images")
    except ImportError as error:
        yield Finding(
            BREAKS, f"DALI, which reads images, is missing: {first_line(error)}", "pip install deitfast[cuda13]"
        )
    except DeitfastError as error:
        yield Finding(BREAKS, str(error))


def _data(data: str, gpus: int) -> Iterator[Finding]:
    if not data:
        yield Finding(NOTE, "no data was looked at", "Give --data FOLDER")
        return
    try:
        found = open_dataset(data, quiet=True)
    except DeitfastError as error:
        yield Finding(BREAKS, str(error))
        return
    for split, manifest in (("training", found.train), ("validation", found.val)):
        if manifest is None:
            yield Finding(BREAKS, f"{data} has no {split} images", "Training needs both splits")
        else:
            yield Finding(OK, f"{data}: {len(manifest):,} {split} images of {len(found.classes)} classes")
    if gpus and found.train is not None:
        problem = gpu_problem(found.train, 224, torch.device("cuda", 0), thread_count(0))
        remedy = "--decode auto takes the CPU"
        yield Finding(NOTE, problem, remedy) if problem else Finding(OK, "the GPU decodes these images as libjpeg does")
    if found.train is not None:
        yield from _loading(found.train, torch.device("cuda", 0) if gpus else torch.device("cpu"))


def _loading(images: Manifest, device: torch.device) -> Iterator[Finding]:
    """How fast these images come out of the training loader, with the paper's augmentation at 224 px."""
    batch = min(_LOADED_AT_ONCE, len(images) // 2 * 2)
    if batch < 2:
        return
    count, begun, started = 0, time.perf_counter(), None
    try:
        recipe = Recipe(batch=batch, mix_group=batch)
        with TrainLoader(images, recipe, 224, batch, device=device, stop_step=10**6) as loader:
            for _ in loader:
                if started is None:  # the first one waits for everything to start
                    started = time.perf_counter()
                    continue
                count += batch
                if time.perf_counter() - begun > _LOADING_SECONDS:
                    break
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except DeitfastError as error:
        yield Finding(BREAKS, str(error))
        return
    seconds = time.perf_counter() - (started or begun)
    speed = f"{count / seconds:,.0f} images/s in {seconds:.1f} s"
    yield Finding(OK, f"one process reads, decodes and augments {speed}: training cannot be faster than that a process")


def _searched(found: Verdict) -> Iterator[Finding]:
    if found.unverified:
        yield Finding(NOTE, f"the launch constants could not be searched: {found.unverified}", "Run this again")
    tried = sum(len(times) - 1 for op in found.ops for times in op.tried.values())
    faster = [f"{op.op}, {selection}: {entry}" for op in found.ops for selection, entry in op.faster.items()]
    yield Finding(
        OK, f"{tried} entries ran beside the launch tables'; {len(faster)} are faster here, and kept for runs"
    )
    yield from (Finding(OK, line) for line in faster)


def _kernels(kernels: Verdict) -> Iterator[Finding]:
    ours = sum(op.form == "ours" for op in kernels.ops)
    if kernels.unverified:
        yield Finding(NOTE, f"the kernels could not be verified: {kernels.unverified}", "Run this again")
    level = OK if kernels.all_ours else NOTE
    yield Finding(level, f"{ours} of {len(kernels.ops)} ops run their kernels here; the others run as eager PyTorch")
