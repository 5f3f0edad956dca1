"""The `deitfast` command. Nothing heavy is imported before a sub-command needs it, so --help answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from deitfast.cli.data import add_data
from deitfast.cli.doctor import add_doctor
from deitfast.cli.estimate import add_estimate
from deitfast.cli.model import add_use
from deitfast.cli.report import add_report
from deitfast.cli.train import add_train
from deitfast.errors import DeitfastError, unknown_argument
from deitfast.guard import guarded


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DeitfastError(f"{message}. `{self.prog} --help` lists what there is")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    guarded(lambda: _dispatch(arguments))


def command_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    """The parser of every command, and the commands by name in its `choices`."""
    parser = _Parser(prog="deitfast", description="Train and use DeiT vision transformers.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_train(commands)
    add_use(commands)
    add_data(commands)
    add_doctor(commands)
    add_report(commands)
    add_estimate(commands)
    return parser, commands


def _dispatch(arguments: Sequence[str] | None) -> None:
    parser, commands = command_parser()
    known, unknown = parser.parse_known_args(arguments)
    if known.command is None:
        parser.print_help()
        return
    if unknown and known.command not in ("train", "data", "estimate"):  # these name wrong flags themselves
        flags = [s for action in commands.choices[known.command]._actions for s in action.option_strings]
        raise unknown_argument(unknown[0], flags)
    known.run(known, unknown)


if __name__ == "__main__":
    main()
