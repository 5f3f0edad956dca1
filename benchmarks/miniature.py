"""The DeiT paper's table in miniature: its claims tried on CIFAR-10, several seeds a row, and a verdict for each.

    python -m benchmarks.miniature --data CIFAR10 [--recipe mini_cifar10_cpu] [--seeds 3] [--rows NAME,...] --out DIR
                                   [--images-per-class N]
    python -m benchmarks.miniature --quick

CIFAR10 is what `deitfast train --data` takes: a folder with the authors' archive, or train/<class>/ and test/<class>/.
--recipe mini_cifar10 runs the whole data set at 32 px (for a GPU); mini_cifar10_cpu a subset of it at 16 px, in about
two minutes of one core a run; --images-per-class takes a larger subset of it, in as many steps. --rows names runs
(`--list` prints them); those that they start from or are taught by are made first. A run that is written down is not
run again, and one that was killed goes on from its newest checkpoint: the same command goes on where it stopped, also
after SIGTERM (exit status 75).

DIR/RUN-SEED.json, a file a run: its command, scores, losses, times, commit and machine; DIR/table.md: rows, spreads
and verdicts, written anew after every run; DIR/table.png, drawn at the end; DIR/runs/: run folders and teachers. Seeds
come one after the other, so that every row has its first before any has its second. A claim holds where the difference
is beyond two standard errors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.measuring.command import fp32_is_fp32
from benchmarks.paper import rows, table
from benchmarks.paper.tokens import compare_tokens
from benchmarks.paper.training import Table, slug, train, write_subset
from deitfast.cli.recipes import load_recipe
from deitfast.errors import DeitfastError, did_you_mean
from deitfast.guard import guarded
from deitfast.recipe import Recipe

PER_CLASS = {"mini_cifar10": 0, "mini_cifar10_cpu": 52}
"""Training images of a class, by recipe; 0: all. An epoch of 520 is 8 steps of 64 with and without repetition."""

_QUICK_PER_CLASS = 8


def opened(options: argparse.Namespace) -> Table:
    """The table that the options ask for, with its data in place."""
    stated = load_recipe(options.recipe)
    if options.quick:
        data = subset_in(options.out, "digits", _QUICK_PER_CLASS, _QUICK_PER_CLASS)
        base = replace(
            stated, data=data, batch=16, mix_group=16, micro_batch=16, epochs=1, warmup_epochs=0.0, workers=1,
            image_size=8,
        )  # fmt: skip
        return Table(options.recipe, base, options.out, teacher_epochs=40, teacher_width=8, quick=True)
    per_class = PER_CLASS[options.recipe]
    width = 16 if per_class else 64
    if per_class and options.images_per_class:
        stated = seen_as_long(stated, options.images_per_class / per_class)
        per_class = options.images_per_class
    data = subset_in(options.out, options.data, per_class) if per_class else options.data
    return Table(options.recipe, replace(stated, data=data), options.out, teacher_epochs=100, teacher_width=width)


def seen_as_long(recipe: Recipe, times: float) -> Recipe:
    """The recipe for so many times the images: as many steps, so fewer passes."""
    return replace(recipe, epochs=round(recipe.epochs / times), warmup_epochs=recipe.warmup_epochs / times)


def subset_in(out: Path, data: str, train_images: int, val_images: int | None = None) -> str:
    """Folder of a subset with so many images a class; made where it is not there."""
    folder = out / "runs" / "data"
    write_subset(data, folder, train_images, val_images)
    return str(folder)


def chosen(runs: Sequence[rows.Run], names: str) -> list[rows.Run]:
    """The runs of these names, separated by commas; all where there are none. DeitfastError for an unknown one."""
    if not names:
        return list(runs)
    by_name = {slug(run.name): run for run in runs}
    for name in names.split(","):
        if name not in by_name:
            raise DeitfastError(f"row {name!r} unknown.{did_you_mean(name, by_name) or ' --list prints them'}")
    return [by_name[name] for name in names.split(",")]


def write_table(made: Table, seeds: Sequence[int]) -> str:
    """Write table.md of what has been run, and return it."""
    results, runs = table.read(made.out), rows.runs(made.recipe)
    text = table.markdown(results, runs, rows.claims(made.recipe), seeds) + table.tokens(made.out)
    (made.out / "table.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature", allow_abbrev=False)
    parser.add_argument("--data", help="CIFAR-10: a folder with its archive, or with train/ and test/")
    parser.add_argument("--recipe", choices=PER_CLASS, default="mini_cifar10_cpu")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="another subset for mini_cifar10_cpu [52]")
    parser.add_argument("--seeds", type=int, default=3, help="runs a row [3]")
    parser.add_argument("--rows", default="", help="names of runs, separated by commas [all]")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps of every row on digits: proves that it runs")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/miniature"))
    options = parser.parse_args(argv)
    fp32_is_fp32()
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.out, options.seeds = Path(folder), 1
        elif not options.data and not options.list:
            raise DeitfastError("no data. Give --data FOLDER with CIFAR-10's archive, or --quick")
        if options.list:
            print("\n".join(slug(run.name) for run in rows.runs(load_recipe(options.recipe))))
            return 0
        made = opened(options)
        seeds = range(options.seeds)
        for seed in seeds:
            for run in chosen(rows.runs(made.recipe), options.rows):
                train(made, run, seed)
                if run.distilled:
                    compare_tokens(
                        run.name, seed, made.folder(run.name, seed), made.recipe.data,
                        made.out / f"tokens-{slug(run.name)}-{seed}.json",
                    )  # fmt: skip
                write_table(made, seeds)
        print(write_table(made, seeds))
        table.draw(table.read(made.out), rows.runs(made.recipe), seeds, made.out / "table.png")
    return 0


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
