"""The `deitfast` command. Nothing heavy is imported before a sub-command needs it, so --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from deitfast.cli.data import add_data
from deitfast.cli.model import add_use
from deitfast.cli.runs import add_runs
from deitfast.cli.train import add_train
from deitfast.errors import DeitfastError, unknown_argument
from deitfast.guard import guarded


class _Parser(argparse.ArgumentParser):
    """Of every command: knows whole flags alone, raises DeitfastError, and does nothing but help until told otherwise.

    passes_on: set to True by a command that takes the flags that it does not know to a recipe.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
        self.set_defaults(parser=self, run=lambda args, unknown: self.print_help(), passes_on=False)

    def error(self, message: str) -> NoReturn:
        raise DeitfastError(f"{message}. `{self.prog} --help` lists what there is")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    guarded(lambda: _dispatch(arguments))


def command_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    parser = _Parser(prog="deitfast", description="Train and use DeiT vision transformers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_train(commands)
    add_use(commands)
    add_data(commands)
    add_runs(commands)
    return parser


def _dispatch(arguments: Sequence[str] | None) -> None:
    known, unknown = command_parser().parse_known_args(arguments)
    if unknown and not known.passes_on:
        raise unknown_argument(unknown[0], known.parser._option_string_actions)
    known.run(known, unknown)


if __name__ == "__main__":
    main()
