"""Memory safety of every op on a GPU: compute-sanitizer's memcheck and racecheck over one small case, both directions.

    python -m benchmarks.sanitize [--out FILE] [--minutes 4] [--only attention]

Each op runs in a process of its own, which the sanitizer watches. `--device cpu --quick` runs the same processes on CPU
without the sanitizer. The exit status is 1 where a check fails, 2 without the tool or the device.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

import torch

from benchmarks.measuring.command import arguments, ready, run_limited
from benchmarks.measuring.harness import Budget, Recorder, synchronize
from benchmarks.measuring.ops import OPS
from benchmarks.micro import Case
from deitfast.kernels.catalogue import Shape

TOOLS = ("memcheck", "racecheck")
ERROR_STATUS = 9


def small_case(name: str, device: str, dtype: torch.dtype, quick: bool) -> None:
    """One op forward and backward: the smallest DeiT, with a token count that fills no block."""
    case = Case(OPS[name], Shape.of("Ti", 5 if quick else 197, 2), device, dtype)
    case.both(case.op.function, case.inputs())
    synchronize(device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=(__doc__ or "").split("\n")[0])
    arguments(parser, minutes=4.0)
    parser.add_argument("--only", nargs="+", choices=list(OPS), default=list(OPS), help="ops; default: all")
    parser.add_argument("--small-case", choices=list(OPS), help="only run this op once; what the sanitizer watches")
    options = parser.parse_args(argv)
    if not ready("sanitize", options.device):
        return 2
    on_gpu = options.device == "cuda"
    if options.small_case:
        small_case(options.small_case, options.device, torch.bfloat16 if on_gpu else torch.float32, options.quick)
        return 0
    tool = shutil.which("compute-sanitizer")
    if on_gpu and tool is None:
        print("sanitize: compute-sanitizer is not installed; it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    budget = Budget(options.minutes)
    failed = []
    with Recorder(options.out, "sanitize", options.device, options.quick) as recorder:
        for check in TOOLS if on_gpu else ("no sanitizer",):
            for name in options.only:
                key = {"check": check, "op": name}
                if not budget.fits(5):
                    recorder.add({"key": key, "skipped": "no time left"})
                    print(f"{check:12} {name:16} skipped: no time left")
                    continue
                command = [sys.executable, "-m", "benchmarks.sanitize", "--small-case", name]
                command += ["--device", options.device]
                command += ["--quick"] * options.quick
                if on_gpu:
                    command = [str(tool), "--tool", check, "--error-exitcode", str(ERROR_STATUS), *command]
                finished = run_limited(command, budget.left)
                verdict = {0: "clean", None: "cut off: no time left"}.get(finished.status, "FAILED")
                print(f"{check:12} {name:16} {verdict} ({finished.seconds:.1f} s)", flush=True)
                tail = (finished.out + finished.err).splitlines()[-25:]
                if verdict == "FAILED":
                    failed.append(name)
                    print("\n".join(tail))
                recorder.add({"key": key, "verdict": verdict, "seconds": finished.seconds, "tail": tail})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
