"""`deitfast train`: a recipe under torchrun, one process a GPU."""

from __future__ import annotations

import argparse
import logging
import sys

from deitfast.cli.recipes import find_recipe, is_recipe, shipped_recipes
from deitfast.errors import EXIT_USER_ERROR, DeitfastError


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add `train`, which passes the flags that it does not know to the recipe."""
    parser = commands.add_parser(
        "train",
        help="run a recipe under torchrun: deitfast train deit_base --data DIR",
        allow_abbrev=False,
        add_help=False,  # `deitfast train RECIPE --help` is the recipe's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="shipped recipes:\n" + "\n".join(f"  {name}" for name in shipped_recipes()),
    )
    parser.add_argument(
        "recipe", nargs="?", help="a shipped recipe's name or a file of your own; the flags after it are the recipe's"
    )
    parser.add_argument("--processes", type=int, default=0, help="processes on this machine; 0: one a GPU, or one")
    parser.set_defaults(run=_train, help_text=parser.format_help())


def _train(args: argparse.Namespace, flags: list[str]) -> None:
    if args.recipe is None and set(flags) <= {"-h", "--help"}:
        print(args.help_text)
        return
    file = find_recipe(_recipe_first(args.recipe, flags))
    processes = args.processes or _gpu_count() or 1
    _launch(["--standalone", f"--nproc-per-node={processes}", str(file), *flags])


def _recipe_first(given: str | None, flags: list[str]) -> str:
    """`given`, where it is not the value of a flag that came before the recipe."""
    after = next((word for word in flags if is_recipe(word)), None)
    if given is None or (after and not is_recipe(given)):
        raise DeitfastError(f"the recipe comes first: deitfast train {after or 'RECIPE'} --data DIR")
    return given


def _launch(arguments: list[str]) -> None:
    """torchrun in this process; a mistake that a worker has already told in one line ends it without a report."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        if all(failure.exitcode != EXIT_USER_ERROR for failure in error.failures.values()):
            raise
        sys.exit(EXIT_USER_ERROR)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
