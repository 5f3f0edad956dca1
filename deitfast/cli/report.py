"""`deitfast report`: a page about runs, live or ended. Imports nothing heavy before it must."""

from __future__ import annotations

import argparse
from pathlib import Path

from deitfast.errors import DeitfastError


def add_report(commands: argparse._SubParsersAction) -> None:
    """Add `report`."""
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
    from deitfast.training.launch import share_cores_politely

    if args.price < 0:
        raise DeitfastError(f"--price is {args.price:g}, must be 0 or more")
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
