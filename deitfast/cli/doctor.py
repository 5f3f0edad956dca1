"""`deitfast doctor`: what on this machine would break a run or slow it down. Imports nothing heavy before it must."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from deitfast.errors import say

_BREAKS = 1


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add `doctor`."""
    parser = commands.add_parser("doctor", help="what on this machine would break a run; exit 1 if anything would")
    parser.add_argument("--data", default="", help="images to look at, as for training")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of runs to be [runs]")
    parser.add_argument(
        "--model", default="deit_base_patch16_224", help="whose shapes to verify the kernels at [deit_base_patch16_224]"
    )
    parser.add_argument("--batch", type=int, default=64, help="images at once to verify the kernels at [64]")
    parser.add_argument(
        "--tune", type=float, nargs="?", const=10.0, default=0.0, metavar="MINUTES",
        help="search the kernels' launch constants first, for so long [10]; later runs use what is found",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON, which a recipe's --fused takes, too")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace, _: list[str]) -> None:
    from deitfast.training.environment import environment
    from deitfast.use.doctor import examine, table

    found = examine(args.model, args.batch, args.data, args.out, say, tune_minutes=args.tune)
    if args.json:
        kernels = None if found.kernels is None else found.kernels.record()
        findings = [asdict(finding) for finding in found.findings]
        told = {"environment": environment(), "findings": findings, "kernels": kernels, "machine": found.machine}
        print(json.dumps(told, indent=1))
    else:
        print("\n".join(map(str, found.findings)))
        if found.kernels is not None:
            print(f"\n{table(found.kernels)}")
    if found.breaks:
        sys.exit(_BREAKS)
