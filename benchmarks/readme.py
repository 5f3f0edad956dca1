"""README's performance section, written from the newest results of the suite on a GPU.

    python -m benchmarks.readme              # rewrites the section between the two markers
    python -m benchmarks.readme --check      # exit status 1 where it is out of date
    python -m benchmarks.readme --goals      # prints every goal beside what has been measured
    python -m benchmarks.readme --add DIR    # first takes a suite's folder into benchmarks/results/

Results are benchmarks/results/suite_<gpu>_<date>.json with the page and the plots of the same name beside them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.harness import load
from benchmarks.measuring.record import ROOT
from benchmarks.reporting import goal_table, rows_of, step_table

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
RESULTS = ROOT / "benchmarks" / "results"


def newest(folder: Path) -> Path | None:
    """The suite's latest results on a GPU in `folder`; rehearsals do not count."""
    dated = []
    for path in folder.glob("suite_*.json"):
        data = load(path)
        if data["theme"] == "suite" and data["device"] == "cuda" and not data["quick"] and rows_of(data, "train_step"):
            dated.append((data["facts"]["date"], path))
    return max(dated)[1] if dated else None


def section(path: Path | None) -> str:
    """The text between the markers for the results in `path`."""
    if path is None:
        return "Not yet measured on a GPU."
    data = load(path)
    facts = data["facts"]
    page = f"benchmarks/results/{path.with_suffix('.md').name}"
    timed = [row for row in rows_of(data, "train_step") if "ms" in row]
    lines = [
        f"Measured on one {facts['gpu']}, {facts['date'][:10]}, torch {facts['torch']}, commit {facts['commit']}; "
        f"written by `python -m benchmarks.readme` from [{page}]({page}), which has everything else.",
        "",
        goal_table(data["rows"], facts["gpu"] or ""),
        "",
        step_table(timed),
    ]
    plot = path.with_name(f"{path.stem}_throughput.png")
    if plot.exists():
        lines += ["", f"![images/s by model and library](benchmarks/results/{plot.name})"]
    return "\n".join(lines)


def goals_so_far(path: Path | None) -> str:
    """The table of goals, from the results in `path` or from none."""
    data: dict[str, Any] = load(path) if path else {"rows": [], "facts": {"gpu": ""}}
    return goal_table(data["rows"], data["facts"]["gpu"] or "")


def rewritten(readme: str, text: str) -> str:
    """`readme` with `text` between the markers. Raises ValueError unless both are there once, in order."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README needs the lines {BEGIN} and {END}, once each and in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def add(folder: Path, results: Path) -> Path:
    """Copy a suite's results, page and plots under their lasting name; the path of the results."""
    data: dict[str, Any] = load(folder / "results.json")
    gpu = re.sub(r"[^a-z0-9]+", "-", (data["facts"]["gpu"] or "cpu").lower()).strip("-")
    stem = f"suite_{gpu}_{data['facts']['date'][:10]}"
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "results.json", results / f"{stem}.json")
    page = (folder / "page.md").read_text()
    for plot in sorted(folder.glob("*.png")):
        shutil.copyfile(plot, results / f"{stem}_{plot.name}")
        page = page.replace(f"]({plot.name})", f"]({stem}_{plot.name})")
    (results / f"{stem}.md").write_text(page)
    return results / f"{stem}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 1 for a section that is out of date (--check), 2 for a README or results that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--goals", action="store_true", help="print the goals, change nothing")
    parser.add_argument("--add", type=Path, metavar="DIR", help="a folder of gpu_suite")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.add:
            print(add(options.add, options.results))
        if options.goals:
            print(goals_so_far(newest(options.results)))
            return 0
        old = options.readme.read_text()
        new = rewritten(old, section(newest(options.results)))
    except (OSError, ValueError) as problem:
        print(f"readme: {problem}", file=sys.stderr)
        return 2
    if options.check:
        if new != old:
            print("readme: README.md is out of date; run python -m benchmarks.readme", file=sys.stderr)
        return int(new != old)
    if new != old:
        options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
