"""`deitfast estimate`: what a recipe will take. Imports nothing heavy before it must."""

from __future__ import annotations

import argparse

from deitfast.cli.recipes import load_recipe
from deitfast.errors import DeitfastError
from deitfast.model.work import CLASSES, GPUS, IMAGENET_IMAGES


def add_estimate(commands: argparse._SubParsersAction) -> None:
    """Add `estimate`, which passes the flags that it does not know to the recipe."""
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
    from deitfast.training.launch import parse_flags, share_cores_politely

    for name in ("gpus", "classes", "images"):
        if getattr(args, name) < 1:
            raise DeitfastError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.price < 0:
        raise DeitfastError(f"--price is {args.price:g}, must be 0 or more")
    recipe = parse_flags(load_recipe(args.recipe), flags, prog=f"deitfast estimate {args.recipe}")
    share_cores_politely()
    from dataclasses import replace

    from deitfast.training.estimate import estimate, table

    replace(recipe, data=recipe.data or "unknown").check()
    print(table(estimate(recipe, GPUS[args.gpu], args.gpus, args.classes, args.images), args.price))
