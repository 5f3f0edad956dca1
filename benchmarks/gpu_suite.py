"""One command that measures everything within its minutes, most valuable first, and ends with one page.

    python -m benchmarks.gpu_suite --out DIR [--minutes 8] [--only step breakdown ...] [--data IMAGENET]
    python -m benchmarks.gpu_suite --device cpu --quick --out DIR

tests       pytest of the kernels on this device: what is wrong need not be fast
roof        the measured matmul rate and bandwidth
step        ours beside every peer and the ablation (bench_train_step)
breakdown   one profiled step by kind of kernel
curves      loss curves of the engine beside eager bf16 and fp32 (loss_curves)
layernorm_qkv, attention, mlp_gelu, block_ops, input, optimizer    each op beside its baselines
inference   images/s and latency beside timm and Hugging Face
loader      the input pipeline beside timm's

DIR/results.json is whole at every moment and holds all rows; DIR/page.md and three PNGs are made from it at the end;
DIR/log.txt keeps what the parts printed. Each part is a process with a time limit of its own, so a crash or a hang
ends that part alone. The same command goes on where it stopped: finished parts are not repeated while the sources are
the same, and rows of peers are kept as long as machine and versions are.

Exit status 1 where the tests failed or a result was refused, 2 without the device.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench_train_step import job_of, machine, ratios, reusable, run_worker
from benchmarks.measuring.command import arguments, ready
from benchmarks.measuring.harness import Budget, load
from benchmarks.measuring.processes import run_limited
from benchmarks.reporting.page import write_page
from benchmarks.reporting.record import facts, gpu_state

QUICK_TESTS = ["tests/kernels/test_layernorm_qkv.py", "tests/kernels/test_mlp.py", "-x", "-m", "not slow and not gpu"]
OPS = {
    "attention": ("attention",),
    "mlp_gelu": ("mlp_gelu",),
    "layernorm_qkv": ("layernorm_qkv", "layernorm"),
    "block_ops": ("block", "layernorm_mlp", "linear_residual"),
}


@dataclass(frozen=True)
class Part:
    """One part. weight: its share of the time that is left when it starts, beside the parts that follow.

    command: arguments after `python -m`; quick: further ones with --quick.
    """

    name: str
    weight: float
    command: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


PARTS = (
    Part("tests", 2.0),
    Part("roof", 0.5),
    Part("step", 6.0, ("benchmarks.bench_train_step",)),
    Part("breakdown", 1.0, ("benchmarks.breakdown",)),
    *(Part(name, 0.5, ("benchmarks.micro", *ops), ("--no-compile",)) for name, ops in OPS.items()),
    Part("input", 0.3, ("benchmarks.micro", "input_patches", "patch_embed")),
    Part("optimizer", 0.3, ("benchmarks.bench_optimizer",)),
    Part("curves", 1.5, ("benchmarks.loss_curves",)),
    Part("inference", 1.0, ("benchmarks.bench_inference",)),
    Part("loader", 1.0, ("benchmarks.bench_loader",)),
)


class Results:
    """DIR/results.json: the facts of the machine, the rows of all parts, and what became of each part.

    Rows carry the name of their `part`. Opening a folder that has results takes them over; those of another
    machine raise ValueError.
    """

    def __init__(self, folder: Path, device: str, quick: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.json"
        here = facts(device)
        self.data: dict[str, Any] = {"theme": "suite", "device": device, "quick": quick, "facts": here, "rows": []}
        self.data |= {"parts": {}, "finished": None}
        if self.path.exists():
            old = load(self.path)
            if machine(old["facts"]) != machine(here) or old["quick"] != quick or old["device"] != device:
                raise ValueError(f"{self.path} is of another machine or device ({machine(old['facts'])}); change --out")
            same = old["facts"]["sources"] == here["sources"]
            self.data |= {"rows": old["rows"], **({"roofs": old["roofs"]} if "roofs" in old else {})}
            self.data["parts"] = {
                name: part if same else part | {"status": "out of date"} for name, part in old["parts"].items()
            }
        self.write()

    def done(self, name: str) -> bool:
        return self.data["parts"].get(name, {}).get("status") == "done"

    def put(self, name: str, rows: Sequence[dict[str, Any]], **part: Any) -> None:
        """Replace the rows of a part and set what is known of it."""
        kept = [row for row in self.data["rows"] if row.get("part") != name]
        self.data["rows"] = kept + [row | {"part": name} for row in rows]
        self.data["parts"][name] = part
        self.write()

    def write(self) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False, default=str) + "\n")
        part.replace(self.path)


def run_part(part: Part, results: Results, options: argparse.Namespace, seconds: float, log: Any) -> None:
    """Run one part within `seconds`, taking its rows over as they come."""
    start = time.monotonic()
    # Steps measured earlier that still hold outlive a run that is cut off before it comes to them.
    earlier = reusable([results.path], results.data["facts"], options.quick) if part.name == "step" else {}
    kept = list(earlier.values())
    kept_keys = [row["key"] for row in kept]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"

        def rows() -> list[dict[str, Any]]:
            found = load(out)["rows"] if out.exists() else []
            measured = [row["key"] for row in found if "ms" in row]
            return [row for row in found if row["key"] in measured or row["key"] not in kept_keys] + [
                row for row in kept if row["key"] not in measured
            ]

        def tick(_: str) -> None:
            if found := rows():
                results.put(part.name, found, status="running", seconds=time.monotonic() - start)

        command = _command(part, results, options, seconds, Path(scratch), out)
        finished = run_limited([sys.executable, "-m", *command], seconds, tick)
        log.write(f"== {part.name}: python -m {' '.join(command)}\n{finished.out}\n{finished.err[-20000:]}\n")
        log.flush()
        found = rows()
    # Status 1 of a benchmark is a refused result: measured, and told by its row.
    ended = finished.status == 0 or (finished.status == 1 and part.command and found)
    unmeasured = any("skipped" in row for row in found)
    status = "cut off" if finished.status is None else "failed" if not ended else "partly" if unmeasured else "done"
    if part.name == "tests":
        found = [{"key": {"op": "tests"}, "status": finished.status, "tail": finished.out.strip().splitlines()[-1:]}]
    problem = None if ended else finished.problem
    results.put(part.name, found, status=status, seconds=finished.seconds, problem=problem)


def _command(
    part: Part, results: Results, options: argparse.Namespace, seconds: float, scratch: Path, out: Path
) -> list[str]:
    if part.name == "tests":
        return [
            "pytest",
            "-q",
            *(
                ["-m", "gpu", "tests/kernels", "tests/test_step.py", "--maxfail=20"]
                if _on_gpu(options)
                else QUICK_TESTS
            ),
        ]
    command = [*part.command, "--device", options.device, "--out", str(out), "--minutes", f"{(seconds - 5) / 60:.2f}"]
    if options.quick:
        command += ["--quick", *part.quick]
    if part.name in ("loader", "curves"):
        command += ["--data", options.data]
    if part.name == "step":
        earlier = scratch / "earlier.json"
        earlier.write_text(results.path.read_text())
        command += ["--reuse", str(earlier)]
        if roof := results.data.get("roofs"):
            command += ["--roof", f"{roof['tflops']},{roof['gbps']}"]
    return command


def _on_gpu(options: argparse.Namespace) -> bool:
    return options.device == "cuda"


def measure_roof(results: Results, options: argparse.Namespace, seconds: float) -> None:
    start = time.monotonic()
    job = job_of("ours", "deit_base", 1, options.device, options.quick)
    found = run_worker(job, None, seconds, "roof")
    if "failed" not in found:
        results.data["roofs"] = found
    status = "failed" if "failed" in found else "done"
    results.put("roof", [], status=status, seconds=time.monotonic() - start, problem=found.get("failed"))


def finish(results: Results, folder: Path) -> None:
    """Page and plots; a suite without matplotlib ends with the page alone."""
    results.data["finished"] = {"date": facts(results.data["device"])["date"], "gpu_state": gpu_state()}
    results.write()
    try:
        from benchmarks.reporting.plots import draw_all

        plots = draw_all(results.data, folder)
    except ImportError as problem:
        print(f"gpu_suite: no plots: {problem}", file=sys.stderr)
        plots = []
    (folder / "page.md").write_text(write_page(results.data, plots))


def main(argv: Sequence[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite")
    arguments(parser)
    parser.set_defaults(out=None)
    parser.add_argument("--only", nargs="+", choices=names, help="parts; also repeats finished ones")
    parser.add_argument("--data", default="digits", help="images for loader and curves; default: the packaged digits")
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("--out DIR is needed")
    if not ready("gpu_suite", options.device):
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running part too
    budget = Budget(options.minutes)
    try:
        results = Results(options.out, options.device, options.quick)
    except ValueError as problem:
        print(f"gpu_suite: {problem}", file=sys.stderr)
        return 2
    chosen = [part for part in PARTS if part.name in options.only] if options.only else list(PARTS)
    waiting = [part for part in chosen if options.only or not results.done(part.name)]
    try:
        with open(options.out / "log.txt", "a") as log:
            for i, part in enumerate(waiting):
                share = part.weight / sum(later.weight for later in waiting[i:])
                seconds = (budget.left - 15) * share  # the page and the plots need their time too
                if seconds < 5:
                    print(f"{part.name}: no time left", flush=True)
                    continue
                if part.name == "roof":
                    measure_roof(results, options, seconds)
                else:
                    run_part(part, results, options, seconds, log)
                state = results.data["parts"][part.name]
                why = f": {state['problem']}" if state.get("problem") else ""
                print(f"{part.name}: {state['status']} in {state['seconds']:.0f} s{why}", flush=True)
    finally:
        finish(results, options.out)
    rows = results.data["rows"]
    print("\n".join(ratios([row for row in rows if row["key"].get("op") == "train_step"])))
    print(f"{options.out / 'page.md'}")
    bad = any("refused" in row for row in rows) or results.data["parts"].get("tests", {}).get("status") == "failed"
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
