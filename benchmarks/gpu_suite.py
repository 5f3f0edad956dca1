"""One command for the first minutes on a GPU: is it right, how fast is it, what is to be done next; ends with one page.

    python -m benchmarks.gpu_suite --out DIR [--minutes 8] [--only step breakdown ...] [--data IMAGENET]
    python -m benchmarks.gpu_suite --device cpu --quick --out DIR

verify      the tests that say most on this device (verify): what is wrong need not be fast
roof        the measured matmul rate and bandwidth
questions   what decides the next work: captures, partial sums, tiles, stages, decoders (questions)
step        ours beside every peer and the ablation (bench_train_step)
smoke       training itself: steps, a capture, a save, a resume, an evaluation; decoded on the CPU and on the GPU
breakdown   one profiled step by kind of kernel
tune        launches of the matrix products and of attention at DeiT-B (tune)
attention, mlp_gelu, layernorm_qkv, block, input, optimizer     each op beside its baselines (micro, bench_optimizer)
tests       every test that needs a GPU (verify --all)
curves      loss curves of the engine beside eager bf16 and fp32 (loss_curves)
inference   images/s and latency beside timm and Hugging Face
loader      the input pipeline beside timm's

DIR/results.json is whole at every moment and holds all rows, DIR/page.md follows it part by part and at the end has
three PNGs; DIR/log.txt keeps what the parts printed. Each part is a process with a time limit of its own, so a crash or
a hang ends that part alone, and its rows up to then are kept. The same command goes on where it stopped: finished parts
are not repeated while the sources are the same, and rows of peers are kept as long as machine and versions are.

Exit status 1 where a test failed or a result was refused, 2 without the device.
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
from benchmarks.measuring.command import Finished, arguments, ready, run_limited
from benchmarks.measuring.harness import Budget, load
from benchmarks.measuring.record import facts, gpu_state
from benchmarks.reporting import draw_all, write_page

OPS = {
    "attention": ("attention",),
    "mlp_gelu": ("mlp_gelu",),
    "layernorm_qkv": ("layernorm_qkv", "layernorm"),
    "block": ("block", "layernorm_attention", "layernorm_mlp", "linear_residual"),
}
NOT_KEPT = {"theme", "device", "quick", "facts", "rows", "finished", "compile_verdicts"}
"""What is not taken over of a part's own file: the suite has it, or it is long and can be had again."""


@dataclass(frozen=True)
class Part:
    """One part. weight: its share of the time that is left when it starts, beside the parts that follow.

    command: arguments after `python -m`; quick: further ones with --quick. data: takes --data. plain: no command of
    ours, so its row is what it printed last.
    """

    name: str
    weight: float
    command: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    data: bool = False
    plain: bool = False


def smoke(decode: str) -> tuple[str, ...]:
    return "deitfast", "train", "recipes/deit_tiny.py", "--smoke", "--decode", decode


PARTS = (
    Part("verify", 3.0, ("benchmarks.verify",)),
    Part("roof", 0.7),
    Part("questions", 1.2, ("benchmarks.questions",)),
    Part("step", 6.0, ("benchmarks.bench_train_step",)),
    Part("smoke", 1.5, smoke("cpu"), data=True, plain=True),
    Part("smoke, GPU decoder", 1.0, smoke("gpu"), data=True, plain=True),
    Part("breakdown", 1.0, ("benchmarks.breakdown",)),
    Part("tune", 1.5, ("benchmarks.tune", "--only", "gemm", "attention", "--models", "B"), ("--models", "Ti")),
    *(Part(name, 0.5, ("benchmarks.micro", *ops), ("--no-compile",)) for name, ops in OPS.items()),
    Part("input", 0.3, ("benchmarks.micro", "input_patches", "patch_embed")),
    Part("optimizer", 0.3, ("benchmarks.bench_optimizer",)),
    Part("tests", 2.5, ("benchmarks.verify", "--all")),
    Part("curves", 1.5, ("benchmarks.loss_curves",), data=True),
    Part("inference", 1.0, ("benchmarks.bench_inference",)),
    Part("loader", 1.0, ("benchmarks.bench_loader",), data=True),
)
"""First whether it is right, then the number that this project is about, then what says where the time goes and what to
change, then all the rest."""


def parts_for(device: str) -> tuple[Part, ...]:
    return tuple(part for part in PARTS if device == "cuda" or "GPU" not in part.name)


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
    """Run one part within `seconds`, taking its rows over as they come, also when the suite itself is ended."""
    start = time.monotonic()
    # Steps measured earlier that still hold outlive a run that is cut off before it comes to them.
    earlier = reusable([results.path], results.data["facts"], options.quick) if part.name == "step" else {}
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.json"

        def take_over(status: str, problem: str | None = None) -> None:
            rows, notes = _found(out, list(earlier.values()))
            if "roofs" in notes:  # of this very run, should the roof's own part have found none
                results.data.setdefault("roofs", notes.pop("roofs"))
            if rows or status != "running":
                state = {"status": status, "seconds": time.monotonic() - start, "problem": problem, "notes": notes}
                results.put(part.name, rows, **state)

        command = _command(part, results, options, seconds, Path(scratch), out)
        try:
            finished = run_limited([sys.executable, "-m", *command], seconds, lambda _: take_over("running"))
        except BaseException:
            take_over("cut off", "the suite was ended")
            raise
        if part.plain:
            out.write_text(json.dumps({"theme": "plain", "facts": {}, "rows": [_last_words(part, finished)]}))
        status = _status(part, finished, _found(out, [])[0])
        take_over(status, finished.problem if status in ("failed", "cut off") else None)
    log.write(f"== {part.name}: python -m {' '.join(command)}\n{finished.out}\n{finished.err[-20000:]}\n")
    log.flush()


def _found(out: Path, kept: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows that a part has written so far with those `kept` that it has not measured again, and its notes."""
    data = load(out) if out.exists() else {"rows": []}
    measured = [row["key"] for row in data["rows"] if "ms" in row]
    kept_keys = [row["key"] for row in kept]
    rows = [row for row in data["rows"] if row["key"] in measured or row["key"] not in kept_keys]
    notes = {name: value for name, value in data.items() if name not in NOT_KEPT}
    return rows + [row for row in kept if row["key"] not in measured], notes


def _status(part: Part, finished: Finished, found: Sequence[dict[str, Any]]) -> str:
    if finished.status is None:
        return "cut off"
    # Status 1 of a benchmark is a refused result or a failed test: measured, and told by its row.
    if finished.status != 0 and not (finished.status == 1 and found and not part.plain):
        return "failed"
    return "partly" if any("skipped" in row for row in found) else "done"


def _last_words(part: Part, finished: Finished) -> dict[str, Any]:
    lines = finished.out.strip().splitlines()
    row = {"key": {"op": "smoke", "part": part.name}, "answer": lines[-1] if lines else ""}
    return row if finished.status == 0 else row | {"failed": finished.problem}


def _command(
    part: Part, results: Results, options: argparse.Namespace, seconds: float, scratch: Path, out: Path
) -> list[str]:
    data = ["--data", options.data] if part.data else []
    if part.plain:
        tiny = [word.replace("deit_tiny", "deit_digits") if options.quick else word for word in part.command]
        return [*tiny, *data, "--device", options.device, "--out", str(scratch / "run")]
    command = [*part.command, "--device", options.device, "--out", str(out), "--minutes", f"{(seconds - 5) / 60:.2f}"]
    command += data
    if options.quick:
        command += ["--quick", *part.quick]
    if part.name == "step":
        earlier = scratch / "earlier.json"
        earlier.write_text(results.path.read_text())
        command += ["--reuse", str(earlier)]
        if roof := results.data.get("roofs"):
            command += ["--roof", f"{roof['tflops']},{roof['gbps']}"]
    return command


def measure_roof(results: Results, options: argparse.Namespace, seconds: float) -> None:
    start = time.monotonic()
    job = job_of("ours", "deit_base", 1, options.device, options.quick)
    found = run_worker(job, None, seconds, "roof")
    if "failed" not in found:
        results.data["roofs"] = found
    status = "failed" if "failed" in found else "done"
    results.put("roof", [], status=status, seconds=time.monotonic() - start, problem=found.get("failed"))


def write_results(results: Results, folder: Path, plots: Sequence[str] = ()) -> None:
    """The page as of now."""
    (folder / "page.md").write_text(write_page(results.data, plots))


def finish(results: Results, folder: Path) -> None:
    """Page and plots; a suite without matplotlib ends with the page alone."""
    results.data["finished"] = {"date": facts(results.data["device"])["date"], "gpu_state": gpu_state()}
    results.write()
    write_results(results, folder)
    try:
        write_results(results, folder, draw_all(results.data, folder))
    except ImportError as problem:
        print(f"gpu_suite: no plots: {problem}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite")
    arguments(parser)
    parser.set_defaults(out=None)
    parser.add_argument("--only", nargs="+", choices=[p.name for p in PARTS], help="parts; also repeats finished ones")
    parser.add_argument("--data", default="digits", help="images for training and loader; default: the packaged digits")
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("--out DIR is needed")
    if not ready("gpu_suite", options.device):
        return 2
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running part too
    try:
        return _suite(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _suite(options: argparse.Namespace) -> int:
    try:
        results = Results(options.out, options.device, options.quick)
    except ValueError as problem:
        print(f"gpu_suite: {problem}", file=sys.stderr)
        return 2
    chosen = [part for part in parts_for(options.device) if not options.only or part.name in options.only]
    try:
        run_all([part for part in chosen if options.only or not results.done(part.name)], results, options)
    finally:
        finish(results, options.out)
    rows = results.data["rows"]
    print("\n".join(ratios([row for row in rows if row["key"].get("op") == "train_step"])))
    print(f"{options.out / 'page.md'}")
    return int(any("refused" in row or (row["key"].get("op") == "tests" and "failed" in row) for row in rows))


def run_all(waiting: Sequence[Part], results: Results, options: argparse.Namespace) -> None:
    """The parts one after another, each with its share of what is left of the minutes."""
    budget = Budget(options.minutes)
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
            write_results(results, options.out)
            state = results.data["parts"][part.name]
            why = f": {state['problem']}" if state.get("problem") else ""
            print(f"{part.name}: {state['status']} in {state['seconds']:.0f} s{why}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
