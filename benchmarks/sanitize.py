"""Memory safety of every op on a GPU: compute-sanitizer's memcheck and racecheck over one small case, both directions.

    python -m benchmarks.sanitize [--out FILE] [--minutes 4] [--only attention]

Each op runs in a process of its own, which the sanitizer watches. `--device cpu --quick` runs the same processes on CPU
without the sanitizer. The exit status is 1 where a check fails, 2 without the tool or the device.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import Budget, Recorder, synchronize
from benchmarks.micro import Case, arguments, device_missing
from benchmarks.ops import OPS, Shape
from benchmarks.record import ROOT

TOOLS = ("memcheck", "racecheck")
ERROR_STATUS = 9


def small_case(name: str, device: str, dtype: torch.dtype, quick: bool) -> None:
    """One op forward and backward: the smallest DeiT, with a token count that fills no block."""
    case = Case(OPS[name], Shape("Ti", 5 if quick else 197, 2), device, dtype)
    case.both(case.op.fused, case.inputs())
    synchronize(device)


def watch(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Exit status (None where the time ran out), seconds and last lines of a command."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        partial = expired.stdout or b""  # bytes even with text=True, on some Python versions
        status, output = None, partial if isinstance(partial, str) else partial.decode(errors="replace")
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "tail": output.splitlines()[-25:]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=(__doc__ or "").split("\n")[0])
    arguments(parser, minutes=4.0)
    parser.add_argument("--only", nargs="+", choices=list(OPS), default=list(OPS), help="ops; default: all")
    parser.add_argument("--small-case", choices=list(OPS), help="only run this op once; what the sanitizer watches")
    options = parser.parse_args(argv)
    if device_missing("sanitize", options.device):
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
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.sanitize",
                    "--small-case",
                    name,
                    "--device",
                    options.device,
                ]
                command += ["--quick"] * options.quick
                if on_gpu:
                    command = [str(tool), "--tool", check, "--error-exitcode", str(ERROR_STATUS), *command]
                result = watch(command, budget.left)
                verdict = {0: "clean", None: "cut off: no time left"}.get(result["status"], "FAILED")
                print(f"{check:12} {name:16} {verdict} ({result['seconds']} s)", flush=True)
                if verdict == "FAILED":
                    failed.append(name)
                    print("\n".join(result["tail"]))
                recorder.add({"key": key, "verdict": verdict, **result})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
