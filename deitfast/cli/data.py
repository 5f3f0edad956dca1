"""`deitfast data`: prepare shards, check images, show what training sees. Imports nothing heavy before it must."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deitfast.cli.recipes import load_recipe
from deitfast.errors import DeitfastError

if TYPE_CHECKING:
    from deitfast.data import Manifest
    from deitfast.recipe import Recipe

_FOUND_SOMETHING = 1


def add_data(commands: argparse._SubParsersAction) -> None:
    """Add `data` with its commands prepare, check and show."""
    parser = commands.add_parser("data", help="prepare, check or show a set of images")
    inner = parser.add_subparsers(dest="data_command", metavar="COMMAND")

    prepare = inner.add_parser("prepare", help="write tar shards and a manifest, so that later starts need no scan")
    prepare.add_argument("source", help="folder as for training: class folders, tar shards or TFRecords")
    prepare.add_argument("out", type=Path, help="new folder; the same command goes on where it stopped")
    prepare.add_argument(
        "--short-side", type=int, default=0, help="reduce longer short sides to so many pixels, as JPEG; 0: copy [0]"
    )
    prepare.add_argument("--quality", type=int, default=95, help="quality of JPEGs that are reduced [95]")
    prepare.add_argument("--per-shard", type=int, default=1000, help="images a shard [1000]")
    prepare.add_argument("--workers", type=int, default=0, help="processes; 0: one a core [0]")
    prepare.set_defaults(run=_prepare)

    check = inner.add_parser(
        "check", help="report damaged, tiny, huge, duplicate and misnamed images; exit 1 if any is damaged",
    )  # fmt: skip
    check.add_argument("data", help="folder as for training")
    check.add_argument("--tiny", type=int, default=32, help="report sides below so many pixels [32]")
    check.add_argument("--huge", type=float, default=25.0, help="report areas above so many million pixels [25]")
    check.add_argument("--json", action="store_true", help="print JSON with every name")
    check.set_defaults(run=_check)

    show = inner.add_parser(
        "show", help="a picture of what training sees, with each view's operations; takes a recipe's flags, too",
    )  # fmt: skip
    show.add_argument("--recipe", help="a recipe's file, or a shipped one's name; without it the paper's settings")
    show.add_argument("--epoch", type=int, default=0, help="epoch, counted from 0 [0]")
    show.add_argument("--count", type=int, default=32, help="views [32]")
    show.add_argument("--mixed", action="store_true", help="after erasing and mixing, too")
    show.add_argument("--out", dest="sheet", type=Path, default=Path("views.png"), help="PNG [views.png]")
    show.set_defaults(run=_show, passes_on=True)


def _prepare(args: argparse.Namespace, _: list[str]) -> None:
    from deitfast.data import open_dataset
    from deitfast.data.prepared_shards import Settings, prepare_shards

    settings = Settings(args.short_side, args.quality, args.per_shard)
    settings.check()
    done = prepare_shards(open_dataset(args.source), args.out, settings, args.workers)
    before = f" ({done.found} were there before)" if done.found else ""
    print(
        f"{args.out}: {done.images:,} images in {done.made + done.found} shards{before}, {done.size / 1e6:,.1f} MB, "
        "all read back with the right checksums"
    )


def _check(args: argparse.Namespace, _: list[str]) -> None:
    from deitfast.data import open_dataset
    from deitfast.data.check import check_dataset

    report = check_dataset(open_dataset(args.data, quiet=True), args.tiny, int(args.huge * 1e6))
    print(json.dumps(report.as_dict(), indent=1) if args.json else "\n".join(report.lines()))
    if report.damaged:
        sys.exit(_FOUND_SOMETHING)


def _show(args: argparse.Namespace, flags: list[str]) -> None:
    from deitfast.recipe import Recipe
    from deitfast.training.launch import parse_flags, share_cores_politely

    share_cores_politely()
    base = load_recipe(args.recipe) if args.recipe else Recipe()
    recipe = parse_flags(base, flags, prog="deitfast data show")
    recipe.check()
    from deitfast.data import open_dataset
    from deitfast.data.show import contact_sheet
    from deitfast.model.zoo import find_variant

    train = open_dataset(recipe.data, split="train").train
    assert train is not None
    size = recipe.image_size or find_variant(recipe.model).image_size
    recipe = _fitting(recipe, train)
    sheet = contact_sheet(train, recipe, size, args.epoch, args.count, args.mixed)
    try:
        sheet.save(args.sheet, "PNG")
    except OSError as error:
        raise DeitfastError(f"cannot write {args.sheet}: {error.strerror or error}. Change --out") from error
    print(f"{args.sheet}: {args.count} views of epoch {args.epoch}, {sheet.width} x {sheet.height} pixels")


def _fitting(recipe: Recipe, train: Manifest) -> Recipe:
    """The recipe, with a batch that so small a set can fill."""
    from dataclasses import replace

    most = len(train) // 2 * 2
    if recipe.batch <= most or most < 2:
        return recipe
    print(f"batch {recipe.batch} is more than the {len(train)} training images; shown is batch {most}")
    return replace(recipe, batch=most)
