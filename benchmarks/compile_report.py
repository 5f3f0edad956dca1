"""Compile every kernel ahead of time, with no GPU, and fail on what would make it slow or unlaunchable.

    python -m benchmarks.compile_report --arch 80,90,100

Each module of `deitfast.kernels` that defines `compile_cases(arch)` is asked for its launch-table entries; each entry
is compiled by Triton for that chip and read back from ptxas's log and from the machine code. One line a kernel gives
registers a thread, bytes of stack, local loads and stores, shared memory, CTAs that fit an SM, and the tensor-core
instructions it uses. The exit status is 1 where a kernel

- spills registers, or keeps an array in local memory;
- needs more shared memory than a block may have, or more tensor memory than an SM has (Triton compiles both);
- is a matrix kernel without the chip's own matrix instruction (on sm_90: wgmma);
- has its wgmma serialised by ptxas (notes C7510 to C7519), which costs time without a spill;
- does not compile.

Arch 0 stands for the launch tables' safe default; it is compiled for sm_86, the smallest chip it must fit.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from deitfast.kernels.common import INTERPRETED, CompileCase


@dataclass(frozen=True)
class Chip:
    """What one SM offers. Source: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".

    shared_block, shared_sm: bytes one block may use, and all blocks of an SM together (1 KiB a block is the driver's).
    tensor_memory: columns of tensor memory an SM has. matrix: the instruction a matrix kernel must use, as a glob.
    """

    target: int
    shared_block: int
    shared_sm: int
    threads: int
    blocks: int
    matrix: str
    tensor_memory: int = 0
    registers: int = 65536


CHIPS = {
    0: Chip(target=86, shared_block=99 << 10, shared_sm=100 << 10, threads=1536, blocks=16, matrix="HMMA"),
    80: Chip(target=80, shared_block=163 << 10, shared_sm=164 << 10, threads=2048, blocks=32, matrix="HMMA"),
    90: Chip(target=90, shared_block=227 << 10, shared_sm=228 << 10, threads=2048, blocks=32, matrix="[HQ]GMMA"),
    100: Chip(
        target=100,
        shared_block=227 << 10,
        shared_sm=228 << 10,
        threads=2048,
        blocks=32,
        matrix="UTC*MMA",
        tensor_memory=512,
    ),
}

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"[HQID]?MMA|[HQI]GMMA|UTC\w*MMA")


@dataclass(frozen=True)
class Task:
    """One case, named so that another process can find it again: kernels themselves do not pickle."""

    module: str
    arch: int
    index: int
    name: str


@dataclass(frozen=True)
class Result:
    """What one compiled kernel uses. shared, stack and spilled are bytes; local counts load and store instructions."""

    name: str
    arch: int
    failures: tuple[str, ...]
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    local: int = 0
    shared: int = 0
    ctas_per_sm: int = 0
    threads: int = 0
    tensor_core: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        kinds = " ".join(f"{kind} {count}" for kind, count in self.tensor_core.items()) or "none"
        return (
            f"{self.arch:>4} {self.name:56} {self.registers:4} {self.stack:6} {self.local:6} {self.shared / 1024:7.1f} "
            f"{self.threads:7} {self.ctas_per_sm:4}  {kinds:18} {'; '.join(self.failures) or 'ok'}"
        )


HEADER = (
    f"{'arch':>4} {'kernel':56} {'regs':>4} {'stack':>6} {'local':>6} {'smem KB':>7} {'threads':>7} {'CTAs':>4}  "
    f"{'tensor core':18} verdict"
)


def kernel_modules(package: str = "deitfast.kernels") -> list[ModuleType]:
    """Modules of `package` that define `compile_cases`, by name."""
    folder = importlib.import_module(package).__path__
    names = sorted(module.name for module in pkgutil.iter_modules(folder, package + "."))
    return [module for module in map(importlib.import_module, names) if hasattr(module, "compile_cases")]


def list_tasks(archs: Sequence[int], only: str = "", package: str = "deitfast.kernels") -> list[Task]:
    """Every case of every kernel module at `archs` whose name contains, or as a glob matches, `only`."""
    return [
        Task(module.__name__, arch, index, case.name)
        for arch in archs
        for module in kernel_modules(package)
        for index, case in enumerate(module.compile_cases(arch))
        if fnmatch.fnmatch(case.name, f"*{only}*")
    ]


def ctas_per_sm(chip: Chip, registers: int, threads: int, shared: int, tensor_memory: int = 0) -> int:
    """CTAs of a kernel that fit one SM: registers come in 8 a thread, shared memory costs 1 KiB more a block."""
    limits = [chip.blocks, chip.threads // threads, chip.registers // (-(-max(registers, 1) // 8) * 8 * threads)]
    limits.append(chip.shared_sm // (shared + 1024))
    if tensor_memory:
        limits.append(chip.tensor_memory // tensor_memory)
    return min(limits)


def compile_case(case: CompileCase, arch: int) -> Result:
    """Compile one case for one arch; a compile error becomes the failure, as its first line."""
    start = time.perf_counter()
    try:
        result = _compile(case, arch)
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__  # Triton wraps the error of an inlined function in one exception a call level
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = Result(case.name, arch, (f"does not compile: {type(error).__name__}: {lines[0] if lines else ''}",))
    return replace(result, seconds=round(time.perf_counter() - start, 2))


def _compile(case: CompileCase, arch: int) -> Result:
    chip = CHIPS[arch]
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    unknown = [name for name in (*case.signature, *case.constexprs) if name not in names]
    if missing or unknown:
        raise ValueError(f"arguments without a type or value: {missing}; not arguments of the kernel: {unknown}")
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name][0] in "iu" and name not in case.not_divisible)
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attrs)
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", chip.target, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    log = printed.getvalue()
    if "Compiling entry function" not in log:  # it came from Triton's cache, which does not keep the log
        log = _ptxas_log(compiled.asm["ptx"], chip.target)
    instructions = Counter(_INSTRUCTION.findall(_disassemble(compiled.asm["cubin"])))
    tensor_core = {kind: count for kind, count in sorted(instructions.items()) if _TENSOR_CORE.fullmatch(kind)}
    registers = _number(r"Used (\d+) registers", log)
    stack = _number(r"(\d+) bytes stack frame", log)
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    local = instructions["LDL"] + instructions["STL"]
    threads = _number(r"\.(?:req|max)ntid (\d+)", compiled.asm["ptx"])  # more than num_warps if warps are specialised
    shared, tensor_memory = compiled.metadata.shared, compiled.metadata.tmem_size or 0

    failures = []
    if spilled or local or stack:
        failures.append(f"spills {spilled} bytes ({local} local loads and stores, {stack} bytes of stack)")
    if shared > chip.shared_block:
        failures.append(f"shared memory {shared / 1024:.1f} KB exceeds {chip.shared_block >> 10} KB")
    if tensor_memory > chip.tensor_memory:
        failures.append(f"tensor memory {tensor_memory} columns exceeds {chip.tensor_memory}")
    if serialised := re.search(r"\((C\d+)\)[^\n]*wgmma\.mma_async instructions are serialized due to ([^\n]*)", log):
        reason = serialised[2].split(" in the function")[0].split(" in function")[0]
        failures.append(f"wgmma serialised ({serialised[1]}: {reason})")
    if case.matrix and not fnmatch.filter(tensor_core, chip.matrix):
        failures.append(f"matrix kernel without {chip.matrix} on sm_{chip.target}")
    return Result(
        name=case.name,
        arch=arch,
        failures=tuple(failures),
        registers=registers,
        stack=stack,
        spilled=spilled,
        local=local,
        shared=shared,
        ctas_per_sm=ctas_per_sm(chip, registers, threads, shared, tensor_memory),
        threads=threads,
        tensor_core=tensor_core,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no match for {pattern!r} in the compiler's output; has its format changed?")
    return int(found[1])


def _ptxas_log(ptx: str, target: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [get_ptxas(target).path, "-lineinfo", "-v", f"--gpu-name={sm_arch_from_capability(target)}"]
        command += [str(path), "-o", f"{folder}/kernel.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run_task(task: Task) -> Result:
    case = importlib.import_module(task.module).compile_cases(task.arch)[task.index]
    return compile_case(case, task.arch)


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Results in the order of `tasks`. A case that kills the compiler is a failure, and the others still run."""
    remaining, workers = list(tasks), jobs
    while remaining:
        with ProcessPoolExecutor(min(workers, len(remaining)), multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_run_task, task) for task in remaining]
            try:
                for future in futures:
                    yield future.result()
                    remaining.pop(0)
            except BrokenProcessPool:
                if workers == 1:  # the only worker died at the first unfinished case
                    task = remaining.pop(0)
                    yield Result(task.name, task.arch, ("does not compile: the compiler crashed",))
                workers = jobs if workers == 1 else 1


def parse_archs(text: str) -> list[int]:
    """Comma-separated keys of `CHIPS` as a list."""
    known = {str(arch): arch for arch in CHIPS}
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in known:
            raise argparse.ArgumentTypeError(f"arch {part!r} is not one of {', '.join(known)}")
    return [known[part] for part in parts]


def main(argv: Sequence[str] | None = None, package: str = "deitfast.kernels") -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=parse_archs, default=list(CHIPS), help="0 (safe default), 80, 90, 100; all")
    parser.add_argument("--only", default="", metavar="PATTERN", help="kernels whose name contains or globs PATTERN")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args(argv)
    if INTERPRETED:
        print("compile_report: TRITON_INTERPRET=1 is set, so nothing can be compiled; unset it", file=sys.stderr)
        return 2
    start = time.perf_counter()
    tasks = list_tasks(options.arch, options.only, package)
    if not tasks:
        print(f"compile_report: no kernel of {package} matches {options.only!r} at {options.arch}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(HEADER)
    results = []
    for result in run_tasks(tasks, max(options.jobs, 1)):
        print(result.line(), flush=True)
        results.append(result)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    failed = [result for result in results if result.failures]
    print(f"{len(results)} kernels compiled in {time.perf_counter() - start:.0f} s, {len(failed)} failed")
    for result in failed:
        print(f"FAILED sm_{CHIPS[result.arch].target} {result.name}: {'; '.join(result.failures)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
