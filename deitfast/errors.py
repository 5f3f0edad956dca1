"""The one exception type that commands turn into a single line on stderr."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

from deitfast.elsewhere import known_elsewhere

EXIT_USER_ERROR = 2
"""Exit code of a command that ended in a DeitfastError."""

EXIT_HOPELESS = 3
"""Exit code of a run that would end in the same way if it were started again: a HopelessError."""

EXIT_INTERRUPTED = 75
"""Exit code of a run that was asked to stop, saved, and can be resumed: EX_TEMPFAIL of sysexits.h."""

_NEAR = 0.5
"""Smallest difflib ratio at which a name is worth suggesting."""


class DeitfastError(Exception):
    """A user's mistake or a broken input, told in one line: what, the evidence, the remedy."""

    exit_code = EXIT_USER_ERROR


class HopelessError(DeitfastError):
    """A run that nobody should start again as it is: it would end in the same way."""

    exit_code = EXIT_HOPELESS


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line; its type where it says nothing."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def unknown_argument(argument: str, flags: Iterable[str]) -> DeitfastError:
    """What to raise for an argument that a command does not know: with what does it here, or its nearest flag."""
    name, flags = argument.split("=", 1)[0], list(flags)
    kind = "flag" if name.startswith("-") else "argument"
    hint = known_elsewhere(name, flags) or did_you_mean(name, flags) or " --help lists the flags."
    return DeitfastError(f"unknown {kind} {name}.{hint}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` Did you mean X?` for the choice nearest to `name`, the first of equals; empty where none is near."""

    def likeness(choice: str) -> float:
        return difflib.SequenceMatcher(None, name, choice).ratio()

    nearest = max(choices, key=likeness, default="")
    return f" Did you mean {nearest}?" if nearest and likeness(nearest) >= _NEAR else ""


def say(line: str) -> None:
    """One line to stderr."""
    print(f"deitfast: {line}", file=sys.stderr, flush=True)
