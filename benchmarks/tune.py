"""Search the launch constants of every kernel at every DeiT shape on this GPU, and print the tables to commit.

    python -m benchmarks.tune --minutes 8 --out FILE [--only attention gemm] [--models B]

For each site (a kernel at a shape):

1. Every candidate is compiled ahead of time, in parallel; those that `benchmarks.compile_report` would fail (spills,
   too much shared memory, serialised wgmma, no compile) are dropped. This needs no GPU: with `--compile-only FILE` a
   machine without one writes the survivors, and `--compiled FILE` takes them.
2. Each survivor runs, and is dropped unless its result is about as close to float64 as eager PyTorch's.
3. Each is timed shortly; the best few, and what the package uses now, again and longer, twice. A candidate wins if it
   is faster than the current launch by more than the runs of either differ.

Results go to FILE after every candidate. `--device cpu --quick` rehearses on two candidates a site, without times.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import compile_report
from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, Recorder, Timing, in_turns, measure, rotating, timed_row, verify
from benchmarks.workshop import Site, sites
from deitfast.kernels.catalogue import MODELS, Draw, Tensors
from deitfast.kernels.common import INTERPRETED, architecture
from deitfast.kernels.tunable import Pick, described
from deitfast.verification.timing import fastest
from deitfast.verification.warm import compile_only

FINALISTS = 3
Verdict = dict[str, dict[str, str]]
"""Site -> candidate -> why it was dropped, or "" where it compiled."""


def candidates_of(site: Site, arch: int, quick: bool) -> list[Pick]:
    """The current launch first, then the others; just one other with `quick`."""
    return site.candidates(arch)[: 2 if quick else None]


# 1. Compile ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A candidate to compile, named so that another process can find it again: kernels themselves do not pickle.

    check: ask the compile report. warm: fill Triton's cache with what the launch on this GPU will ask for.
    """

    site: str
    index: int
    arch: int
    batch: int
    quick: bool
    check: bool
    warm: bool


def compile_candidate(task: Task) -> str:
    """Why the candidate must be dropped, or ""."""
    site = next(site for site in sites(task.batch) if site.name == task.site)
    candidate = candidates_of(site, task.arch, task.quick)[task.index]
    with site.apply(task.arch, candidate):
        for case in site.cases(task.arch) if task.check else []:
            result = compile_report.compile_case(case, task.arch)
            if result.failures:
                return "; ".join(result.failures)
        if task.warm:
            # A few samples do: a kernel is compiled anew for another divisibility of a size, not for another size.
            inputs = site.inputs(Draw(0, torch.bfloat16, "cuda"), replace(site.shape, batch=16))
            with compile_only():
                site.call(inputs)
    return ""


def _same_code(site: Site, candidate: Pick, arch: int) -> str:
    """Equal for candidates that compile to the same code: most kernels take their sizes at run time."""
    with site.apply(arch, candidate):
        return str([(case.kernel.__name__, case.traits()) for case in site.cases(arch)])


def compile_all(
    chosen: Sequence[Site], arch: int, batch: int, quick: bool, warm: bool, budget: Budget, known: Verdict | None
) -> Verdict:
    """Compile the candidates of the sites, in parallel, until the budget ends; those left are no part of the result.

    known: verdicts of an earlier run, which are taken as they are; what it lets live is only warmed.
    """
    verdicts: Verdict = {site.name: dict((known or {}).get(site.name, {})) for site in chosen}
    groups: dict[str, list[tuple[str, str]]] = {}
    tasks: dict[str, Task] = {}
    for site in chosen:
        for index, candidate in enumerate(candidates_of(site, arch, quick)):
            earlier = verdicts[site.name].get(described(candidate))
            if earlier or (earlier is not None and not warm):
                continue
            code = _same_code(site, candidate, arch)
            groups.setdefault(code, []).append((site.name, described(candidate)))
            tasks.setdefault(code, Task(site.name, index, arch, batch, quick, check=earlier is None, warm=warm))

    def record(code: str, why: str) -> None:
        for site_name, candidate_name in groups[code]:
            verdicts[site_name][candidate_name] = why

    if quick:
        for code, task in tasks.items():
            record(code, compile_candidate(task))
        return verdicts
    pool = ProcessPoolExecutor(os.cpu_count() or 1, multiprocessing.get_context("spawn"))
    futures = {pool.submit(compile_candidate, task): code for code, task in tasks.items()}
    try:
        for future in as_completed(futures, timeout=max(budget.left, 1)):
            try:
                record(futures[future], future.result())
            except BrokenProcessPool:
                record(futures[future], "the compiler crashed, here or at a candidate beside it")
            except Exception as error:
                record(futures[future], f"{type(error).__name__}: {error}".splitlines()[0])
    except TimeoutError:
        print("tune: the time for compiling is over; the rest is left out", file=sys.stderr)
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
    return verdicts


# 2. Check, 3. time ---------------------------------------------------------------------------------------------------


class Trial:
    """A site with its tensors on the device."""

    def __init__(self, site: Site, arch: int, device: str) -> None:
        self.site, self.arch, self.device = site, arch, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.sets = rotating(partial(self._inputs, seed=0), device)
        first = self.sets[0]
        self.exact = site.eager({name: tensor.double() for name, tensor in first.items()})
        self.eager = site.eager(first)

    def _inputs(self, seed: int) -> Tensors:
        return self.site.inputs(Draw(seed, self.dtype, self.device), self.site.shape)

    def check(self, candidate: Pick) -> None:
        """Raise Refused where the candidate is wrong, and whatever it raises where it does not run."""
        with self.site.apply(self.arch, candidate):
            results = self.site.call(self.sets[0])
        for i, (actual, exact, eager) in enumerate(zip(results, self.exact, self.eager, strict=True)):
            verify(f"{self.site.name} result {i}", actual, exact, eager.to(actual.dtype), self.site.factor)

    def time(self, candidate: Pick, budget_ms: float) -> Timing:
        with self.site.apply(self.arch, candidate):
            return measure(self.site.call, device=self.device, sets=self.sets, budget_ms=budget_ms, graph=True)


def tune_site(
    site: Site, arch: int, device: str, quick: bool, verdicts: dict[str, str], recorder: Recorder, budget: Budget
) -> tuple[Pick, dict[str, float]]:
    """The winner of a site, and the short time of each candidate that is right, in ms (none on CPU)."""
    current, *others = candidates_of(site, arch, quick)
    trial = Trial(site, arch, device)
    times: dict[str, float] = {}
    right: list[Pick] = []
    for candidate in (current, *others):
        key = {"site": site.name, "candidate": described(candidate)}
        why = verdicts.get(described(candidate), "not compiled in time")
        if why and candidate is not current:
            recorder.add({"key": key, "failed": why})
            continue
        if not budget.fits(1) and not quick:
            recorder.add({"key": key, "skipped": "no time left"})
            continue
        try:
            trial.check(candidate)
            if device == "cuda":
                times[described(candidate)] = trial.time(candidate, 20).median_ms
        except Exception as problem:
            recorder.add({"key": key, "failed": f"{type(problem).__name__}: {problem}".splitlines()[0]})
            if device == "cuda":
                torch.cuda.synchronize()  # raises where the candidate broke the context: nothing after it counts
            continue
        right.append(candidate)
        recorder.add({"key": key, "checked": True, "short_ms": times.get(described(candidate))})
    if device != "cuda" or current not in right:
        return current, times
    finalists = sorted((c for c in right if c is not current), key=lambda c: times[described(c)])[:FINALISTS]
    runs: dict[str, list[Timing]] = {}
    for candidate in (current, *finalists) * 2:
        runs.setdefault(described(candidate), []).append(trial.time(candidate, 100))
    if site.rival:
        rival = in_turns({site.rival: site.eager}, device=device, sets=trial.sets, budget_ms=100)[site.rival]
        runs |= {site.rival: rival.timings} if rival.problem is None else {}
    for name, timings in runs.items():
        recorder.add(timed_row({"site": site.name, "candidate": name, "round": "final"}, timings))
    ours = {described(c): [t.median_ms for t in runs[described(c)]] for c in (current, *finalists)}
    best = fastest(ours, described(current))
    return next(c for c in (current, *finalists) if described(c) == best), times


def beside_rival(rows: Sequence[dict[str, Any]], site: Site, winner: Pick) -> str:
    """How long the site's rival takes beside the winner, in words; nothing where there is none or none was timed."""
    final = {"site": site.name, "round": "final"}
    times = {row["key"]["candidate"]: row["ms"] for row in rows if final.items() <= row["key"].items()}
    if site.rival not in times or described(winner) not in times:
        return ""
    return f"; {site.rival} takes {times[site.rival] / times[described(winner)]:.2f} x as long"


def gemm_by_width(timed: Sequence[tuple[Site, int, dict[str, float]]]) -> list[str]:
    """For tables keyed by the columns of a tile: the tile of each width that is best over the sites which use it."""
    lines = []
    for width in sorted({width for _, width, _ in timed}):
        times = [times for _, w, times in timed if w == width]
        shared = set.intersection(*(set(t) for t in times))
        fitting = [name for name in shared if f"BLOCK_N={width} " in name]
        if fitting:
            best = min(fitting, key=lambda name: sum(t[name] for t in times))
            lines.append(f"# (2, {width}): {best}   over {len(times)} shapes")
    return lines


# The command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    arguments(parser)
    names = list(dict.fromkeys(site.op for site in sites()))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="kernels; default: all")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--arch", type=int, choices=(80, 90, 100), help="for --compile-only; default: this GPU's")
    parser.add_argument("--compile-only", type=Path, metavar="FILE", help="only compile, and write what survives")
    parser.add_argument("--compiled", type=Path, metavar="FILE", help="survivors from --compile-only")
    options = parser.parse_args(argv)
    if INTERPRETED:
        print("tune: TRITON_INTERPRET=1 is set, so nothing can be compiled; unset it", file=sys.stderr)
        return 2
    if options.compile_only is None and not ready("tune", options.device):
        return 2
    on_gpu = options.compile_only is None and options.device == "cuda"
    arch = architecture(torch.empty(0, device="cuda")) if on_gpu else options.arch or 90
    batch = 1 if options.quick else 256
    chosen = [site for site in sites(batch) if site.op in options.only and site.shape.model in options.models]
    budget = Budget(options.minutes)
    known: Verdict | None = None
    if options.compiled is not None:
        known = json.loads(options.compiled.read_text())
    limit = Budget(options.minutes * (0.5 if options.compile_only is None else 1.0))
    verdicts = compile_all(chosen, arch, batch, options.quick, on_gpu, limit, known)
    kept = sum(not why for site in verdicts.values() for why in site.values())
    print(f"{kept} of {sum(map(len, verdicts.values()))} candidates compile well for sm_{arch}")
    if options.compile_only is not None:
        options.compile_only.write_text(json.dumps(verdicts, indent=1) + "\n")
        return 0
    failed, entries, gemms = False, [], []
    with Recorder(options.out, "tune", options.device, options.quick) as recorder:
        recorder.note("compile_verdicts", verdicts)
        for site in chosen:
            if not options.quick and not budget.fits(5):
                recorder.add({"key": {"site": site.name}, "skipped": "no time left"})
                print(f"{site.name}: no time left")
                continue
            selection = site.selection(arch)
            current = selection.own
            winner, times = tune_site(
                site, arch, options.device, options.quick, verdicts.get(site.name, {}), recorder, budget
            )
            bad = [row for row in recorder.rows if row["key"] == {"site": site.name, "candidate": described(current)}]
            failed |= any("failed" in row for row in bad)
            verdict = "rehearsed" if not times else "keeps" if winner == current else "now"
            beside = beside_rival(recorder.rows, site, winner)
            print(f"{site.name}: {verdict} {described(winner)}{beside}", flush=True)
            entries.append(f"{selection.name}: {described(winner)}  # {site.name}{beside}")
            if site.op == "gemm" and times and current is not None:
                gemms.append((site, current.tiles["BLOCK_N"], times))
            recorder.note("tables", entries)
        print(f"# sm_{arch}" + ("" if options.device == "cuda" else ": the current tables; nothing was timed"))
        print("\n".join(entries + gemm_by_width(gemms)))
    if failed:
        print("tune: a launch that the package uses now is wrong or does not run; see the rows above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
