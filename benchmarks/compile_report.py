"""Compile every kernel ahead of time, with no GPU, and fail on what would make it slow or unlaunchable.

    python -m benchmarks.compile_report --arch 80,90,100

The public ops are used, forward and backward, on tensors without data (`benchmarks.workshop`), and what
they would launch on that chip is recorded. Each kernel is specialised as a launch would specialise it (a size that is 1
or a multiple of 16, a pointer that is aligned), compiled by Triton and read back from ptxas's log and the machine code.
One line a kernel gives registers a thread, bytes of stack, local loads and stores, shared memory, CTAs that fit an SM,
and the tensor-core instructions it uses. The exit status is 1 where a kernel

- spills registers, or keeps an array in local memory;
- shares its work out among more programs than the chip's multiprocessors hold at once (by registers, threads and
  shared memory): the rest would run after the others, on a chip that is mostly idle;
- needs more shared memory than a block may have, or more tensor memory than an SM has (Triton compiles both);
- multiplies 16-bit matrices without the chip's own matrix instruction (on sm_90: wgmma);
- has its wgmma serialised by ptxas (notes C7510 to C7519), which costs time without a spill;
- divides blocks of 64-bit integers (a call of some 75 instructions each, where 32 bits take few);
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
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from deitfast.kernels.common import INTERPRETED, Recorded, on_16_bytes, record


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


USES = "benchmarks.workshop"
MULTIPROCESSORS = {100: 148}
"""Where they are more than the 132 of an H100, for which the programs that share a sum out are made on every chip."""
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
_MATRIX_PRODUCT = re.compile(r"tt\.dot\b[^\n]*: tensor<[^>]*x(?:bf16|f16)\b")  # of 16-bit operands, in Triton's IR
_LONG_DIVISION = re.compile(r"arith\.(?:div|rem)[su]i [^\n]*: tensor<[^>]*xi64>")
_TENSOR_CORE = re.compile(r"[HQID]?MMA|[HQI]GMMA|UTC\w*MMA")


@dataclass(frozen=True)
class Case:
    """A kernel as a launch specialises it.

    signature: argument name -> Triton type, "constexpr" for those in `constexprs`, by position -> value. attrs: by
    position -> what is known of the argument. options: of the compilation. programs: that share the work out; 0: none.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[tuple[int, ...], Any]
    attrs: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    programs: int = 0

    def traits(self) -> dict[str, str]:
        """What tells this case from others of its kernel: each argument's type or value, each option; "" for None."""
        return {
            name: self._trait(kind, self.constexprs.get((position,)), bool(self.attrs.get((position,))))
            for position, (name, kind) in enumerate(self.signature.items())
        } | {name: str(value) for name, value in self.options.items()}

    @staticmethod
    def _trait(kind: str, value: Any, divisible: bool) -> str:
        if kind == "constexpr":
            return "" if value is None else str(value)
        if kind.startswith("tensordesc"):
            return kind.removeprefix("tensordesc<").removesuffix(">").replace(" ", "")
        if kind.startswith("*"):
            return kind[1:] if divisible else f"{kind[1:]}(unaligned)"
        return f"{kind}(16n)" if divisible else kind


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
            f"{self.arch:>4} {self.registers:4} {self.stack:6} {self.local:6} {self.shared / 1024:7.1f} "
            f"{self.threads:7} {self.ctas_per_sm:4}  {kinds:18} {self.name}: {'; '.join(self.failures) or 'ok'}"
        )


HEADER = (
    f"{'arch':>4} {'regs':>4} {'stack':>6} {'local':>6} {'smem KB':>7} {'threads':>7} {'CTAs':>4}  {'tensor core':18} "
    "kernel: verdict"
)


class _Pointer:
    """What a launch looks at in a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype, self._aligned = x.dtype, on_16_bytes(x)

    def data_ptr(self) -> int:
        return 0 if self._aligned else 1


def specialise(launch: Recorded, arch: int) -> Case:
    """The kernel of a recorded launch as Triton's JIT would compile it; TypeError where its arguments do not fit."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", CHIPS[arch].target, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {name: _Pointer(x) if isinstance(x, torch.Tensor) else x for name, x in launch.arguments.items()}
    options = launch.entry.options()
    bound, specialization, _ = bind(**arguments, **options)
    _, signature, constexprs, attrs = kernel._pack_args(backend, options, bound, specialization, options)
    name = kernel.__name__.removesuffix("_kernel")
    return Case(name, kernel, signature, constexprs, attrs, options, launch.entry.programs)


def _named(cases: Sequence[Case]) -> Iterator[Case]:
    """The cases of one kernel, named by what differs between them, except for what follows from it."""
    traits = [case.traits() for case in cases]
    names = [case.name for case in cases]
    for trait in traits[0]:
        if len(set(names)) == len(cases):
            break
        values = [found[trait] for found in traits]
        finer = [f"{name} {trait}={value}" if value else name for name, value in zip(names, values, strict=True)]
        if len(set(finer)) > len(set(names)):
            names = finer
    return (replace(case, name=name) for case, name in zip(cases, names, strict=True))


@cache
def find_cases(module: str, arch: int) -> tuple[Case, ...]:
    """What `uses()` of the module launches on a chip of `arch`."""
    with FakeTensorMode(), record(arch) as launches:
        importlib.import_module(module).uses()
    return tuple(cases_of(launches, arch))


def cases_of(launches: Sequence[Recorded], arch: int) -> list[Case]:
    """The kernels of recorded launches, once for each specialisation."""
    found: dict[str, dict[str, Case]] = defaultdict(dict)
    for launch in launches:
        case = specialise(launch, arch)
        found[case.name].setdefault(str(case.traits()), case)
    return [case for same_kernel in found.values() for case in _named(list(same_kernel.values()))]


def list_tasks(archs: Sequence[int], only: str = "", module: str = USES) -> list[Task]:
    """Every case of the module's uses at `archs` whose name contains, or as a glob matches, `only`."""
    return [
        Task(module, arch, index, case.name)
        for arch in archs
        for index, case in enumerate(find_cases(module, arch))
        if fnmatch.fnmatch(case.name, f"*{only}*")
    ]


def ctas_per_sm(chip: Chip, registers: int, threads: int, shared: int, tensor_memory: int = 0) -> int:
    """CTAs of a kernel that fit one SM: registers come in 8 a thread, shared memory costs 1 KiB more a block."""
    limits = [chip.blocks, chip.threads // threads, chip.registers // (-(-max(registers, 1) // 8) * 8 * threads)]
    limits.append(chip.shared_sm // (shared + 1024))
    if tensor_memory:
        limits.append(chip.tensor_memory // tensor_memory)
    return min(limits)


def compile_case(case: Case, arch: int) -> Result:
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


def _compile(case: Case, arch: int) -> Result:
    chip = CHIPS[arch]
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), dict(case.attrs))
    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        target = GPUTarget("cuda", chip.target, 32)
        compiled = triton.compile(source, target=target, options=dict(case.options))
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
    if divisions := len(_LONG_DIVISION.findall(compiled.asm["ttir"])):
        failures.append(f"divides blocks of 64-bit integers {divisions} times")
    ctas = ctas_per_sm(chip, registers, threads, shared, tensor_memory)
    if case.programs > (fit := ctas * MULTIPROCESSORS.get(arch, 132)):
        failures.append(f"{case.programs} programs share its work out, of which {fit} fit the chip at once")
    if _MATRIX_PRODUCT.search(compiled.asm["ttir"]) and not fnmatch.filter(tensor_core, chip.matrix):
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
        ctas_per_sm=ctas,
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
        command = [knobs.nvidia.nvdisasm.path, "-c", "--no-dataflow", str(path)]  # which names branches' targets: 0.1 s
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _run_task(task: Task) -> Result:
    return compile_case(find_cases(task.module, task.arch)[task.index], task.arch)


def run_tasks(tasks: Sequence[Task], jobs: int) -> Iterator[Result]:
    """Results in the order of `tasks`. A case that kills the compiler is a failure, and the others still run."""
    remaining, workers = list(tasks), jobs
    processes = multiprocessing.get_context("forkserver")
    # What is imported once, for every pool: torch, Triton, and what the first tensor without data imports.
    processes.set_forkserver_preload(["benchmarks.compile_report", "torch._dynamo"])
    while remaining:
        with ProcessPoolExecutor(min(workers, len(remaining)), processes) as pool:
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


def main(argv: Sequence[str] | None = None, module: str = USES) -> int:
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
    tasks = list_tasks(options.arch, options.only, module)
    if not tasks:
        print(f"compile_report: no kernel of {module} matches {options.only!r} at {options.arch}", file=sys.stderr)
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
