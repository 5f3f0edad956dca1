"""The `deitfast` command. Nothing heavy is imported before a sub-command needs it, so --help answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from deitfast.cli.data import add_data
from deitfast.cli.model import add_use
from deitfast.errors import EXIT_USER_ERROR, DeitfastError, did_you_mean
from deitfast.guard import guarded


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DeitfastError(f"{message}. `{self.prog} --help` lists what there is")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    guarded(lambda: _dispatch(arguments))


def _dispatch(arguments: Sequence[str] | None) -> None:
    parser = _Parser(prog="deitfast", description="Train and use DeiT vision transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_train(commands)
    add_use(commands)
    add_data(commands)
    known, unknown = parser.parse_known_args(arguments)
    if known.command is None:
        parser.print_help()
        return
    if unknown and known.command not in ("train", "data"):  # these name wrong flags themselves
        flags = [s for action in commands.choices[known.command]._actions for s in action.option_strings]
        raise DeitfastError(f"unknown argument {unknown[0]}.{did_you_mean(unknown[0].split('=')[0], flags)}")
    known.run(known, unknown)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        help="run a recipe under torchrun: deitfast train recipes/deit_base.py --data DIR",
        allow_abbrev=False,
        add_help=False,  # `deitfast train FILE --help` is the recipe's
    )
    parser.add_argument("recipe", nargs="?", help="a recipe file; the flags after it are the recipe's")
    parser.add_argument("--processes", type=int, default=0, help="processes on this machine; 0: one a GPU, or one")
    parser.set_defaults(run=_train, usage=parser.format_help())


def _train(args: argparse.Namespace, flags: list[str]) -> None:
    if args.recipe is None:
        print(args.usage)
        return
    if not Path(args.recipe).is_file():
        nearby = [str(p) for p in Path("recipes").glob("*.py")]
        raise DeitfastError(f"no recipe file {args.recipe}.{did_you_mean(args.recipe, nearby)}")
    processes = args.processes or _gpu_count() or 1
    _launch(["--standalone", f"--nproc-per-node={processes}", args.recipe, *flags])


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


if __name__ == "__main__":
    main()
