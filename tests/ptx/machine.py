"""A launch of an assembled program: options, memory it may touch, its errors and races in words."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.ptx.assembler import Program
from tests.ptx.binding import MAX_WARPS, SHARED_BASE, LaunchStruct, Race, Range, library, operations
from tests.ptx.parser import PtxError


@dataclass(frozen=True)
class Options:
    """How a launch is run. Every combination is a legal execution of a correct kernel.

    late: copies, tensor loads and stores and wgmma take effect as late as the program's waits allow, and their
        destination is NaN until then; else at once.
    schedule: "forward" (each warp in turn runs until it must wait), "reverse" (last warp first) or "random" (a random
        warp runs for a random number of instructions, at most `quantum`; from `seed`).
    reverse_ctas: the last CTA of the grid runs first.
    races: whether a data race in shared memory, or between CTAs in global memory, is an error.
    max_steps: warp instructions of one CTA, after which it counts as hung.
    """

    late: bool = True
    schedule: str = "forward"
    quantum: int = 50
    seed: int = 1
    reverse_ctas: bool = False
    races: bool = False
    max_steps: int = 200_000_000


@dataclass(frozen=True)
class Launch:
    """What ran. operations: the engine's name of an instruction -> how often a warp executed it."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    operations: dict[str, int]


_RACES = (
    "two writes without an order",
    "a read that no barrier orders after the write",
    "a write that no barrier orders after the read",
    "a generic write read through the async proxy without a fence.proxy.async",
    "two CTAs write the same global byte",
    "a CTA reads a global byte that another one writes",
    "a CTA writes a global byte that another one reads",
)


def run(
    program: Program,
    grid: tuple[int, int, int],
    warps: int,
    shared: int,
    parameters: bytes,
    memory: Sequence[tuple[int, int]],
    options: Options,
) -> Launch:
    """Run the grid; PtxError on any fault.

    parameters: the kernel's parameter buffer; shared: bytes of a CTA; memory: (address, bytes) that it may touch.
    """
    kernel = program.kernel
    if warps > MAX_WARPS:
        raise PtxError(f"{kernel.name}: {warps} warps")
    ctypes.memset(program.parameters, 0, kernel.parameter_bytes)
    ctypes.memmove(program.parameters, parameters, len(parameters))
    merged = _merge([*memory, *((ctypes.addressof(x), ctypes.sizeof(x)) for x in program.keep[1:])])
    ranges = (Range * max(1, len(merged)))(*(Range(start, end) for start, end in merged))
    counts = np.zeros(len(operations()), np.uint64)
    launch = LaunchStruct(
        code=program.code.ctypes.data, pool=program.pool.ctypes.data, image=program.image.ctypes.data,
        slots=program.slots, predicates=program.predicates, warps=warps, shared_size=shared,
        param=program.parameters, param_size=kernel.parameter_bytes, range=ranges, ranges=len(merged),
        late=options.late, schedule=("forward", "reverse", "random").index(options.schedule),
        quantum=options.quantum, races=options.races, reverse_ctas=options.reverse_ctas, seed=options.seed,
        max_steps=options.max_steps, op_count=counts.ctypes.data,
    )  # fmt: skip
    launch.special[:], launch.grid[:] = program.special, grid
    if library().run_launch(ctypes.byref(launch)):
        raise PtxError(_failure(program, launch))
    if launch.nrace:
        found = "\n".join(_race(program, launch.race[i]) for i in range(launch.nrace))
        raise PtxError(f"{kernel.name} (sm_{kernel.target}): {launch.nrace} kinds of data races\n{found}")
    ran = {name: int(counts[number]) for name, number in operations().items() if counts[number]}
    return Launch(kernel.name, grid, warps, ran)


def _merge(memory: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Distinct ranges (start, end); overlapping ones merged, adjacent ones not."""
    out: list[tuple[int, int]] = []
    for start, size in sorted(memory):
        if size <= 0:
            continue
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], start + size))
        else:
            out.append((start, start + size))
    return out


def _where(program: Program, line: int) -> str:
    statement = program.statements.get(line)
    return f"PTX line {line}: {statement.text[:200]} [{statement.location}]" if statement else f"PTX line {line}"


def _failure(program: Program, launch: LaunchStruct) -> str:
    return (
        f"{program.kernel.name} (sm_{program.kernel.target}): {launch.message.decode()}\n"
        f"  at {_where(program, launch.failed_line)}\n"
        f"  CTA {launch.failed_cta}, warp {launch.failed_warp}, lane {launch.failed_lane}"
    )


def _race(program: Program, race: Race) -> str:
    if race.kind >= 4:
        where = f"address 0x{race.address:x}, CTAs {race.warp_a} and {race.cta}"
        return f"  {_RACES[race.kind]}: {where}\n    {_where(program, race.line_b)}"
    return (
        f"  {_RACES[race.kind]}: shared offset {race.address - SHARED_BASE}, CTA {race.cta}\n"
        f"    warp {race.warp_a}: {_where(program, race.line_a)}\n"
        f"    warp {race.warp_b}: {_where(program, race.line_b)}"
    )
