"""Commands about runs: what one will take (estimate), what would break it here (doctor), what became of it (report).

Nothing heavy is imported before one runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from deitfast.cli.recipes import load_recipe
from deitfast.errors import DeitfastError, say
from deitfast.model.work import CLASSES, GPUS, IMAGENET_IMAGES
from deitfast.training.launch import parse_flags, share_cores_politely

_BREAKS = 1


def add_runs(commands: argparse._SubParsersAction) -> None:
    """Add the commands of this module."""
    _add_doctor(commands)
    _add_report(commands)
    _add_estimate(commands)


def _check_price(price: float) -> None:
    if price < 0:
        raise DeitfastError(f"--price is {price:g}, must be 0 or more")


# doctor --------------------------------------------------------------------------------------------------------------


def _add_doctor(commands: argparse._SubParsersAction) -> None:
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


# report --------------------------------------------------------------------------------------------------------------


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="one page about a run, live or ended, or about several: report.html")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, default=None, help="file to write; empty: report.html in the first folder")
    parser.add_argument("--price", type=float, default=0.0, help="of an hour of one GPU, for the cost; 0: unknown [0]")
    parser.add_argument(
        "--quick", action="store_true", help="read no images and no weights: curves, settings and environment alone"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="to evaluate on [auto]")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace, _: list[str]) -> None:
    _check_price(args.price)
    share_cores_politely()
    from deitfast.training.report import Seen, look, write_report
    from deitfast.training.run_record import read_run
    from deitfast.use.eval_plots import figure_class

    figure_class()  # refused before anything is evaluated
    runs = [read_run(path) for path in args.runs]
    seen = [Seen() if args.quick else look(run, args.device) for run in runs]
    out = args.out or args.runs[0] / "report.html"
    write_report(runs, seen, out, args.price)
    print(f"{out}: {len(runs)} run(s), {out.stat().st_size / 1e6:.1f} MB, opens without a network")


# estimate ------------------------------------------------------------------------------------------------------------


def _add_estimate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "estimate",
        help="what a recipe takes on some GPUs: memory, largest batch, least hours and cost",
    )
    parser.add_argument("recipe", help="a shipped recipe's name or a file of your own; its flags may follow")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs [1]")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="whose datasheet [h100]")
    parser.add_argument("--classes", type=int, default=CLASSES, help=f"classes of the data [{CLASSES}]")
    parser.add_argument("--images", type=int, default=IMAGENET_IMAGES, help=f"training images [{IMAGENET_IMAGES}]")
    parser.add_argument("--price", type=float, default=0.0, help="of an hour of one GPU; 0: unknown [0]")
    parser.set_defaults(run=_estimate, passes_on=True)


def _estimate(args: argparse.Namespace, flags: list[str]) -> None:
    for name in ("gpus", "classes", "images"):
        if getattr(args, name) < 1:
            raise DeitfastError(f"--{name} is {getattr(args, name)}, must be at least 1")
    _check_price(args.price)
    recipe = parse_flags(load_recipe(args.recipe), flags, prog=f"deitfast estimate {args.recipe}")
    share_cores_politely()
    from deitfast.training.estimate import estimate, table

    replace(recipe, data=recipe.data or "unknown").check()
    print(table(estimate(recipe, GPUS[args.gpu], args.gpus, args.classes, args.images), args.price))
