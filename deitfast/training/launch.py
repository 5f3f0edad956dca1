"""A recipe's door: its flags, and training under torchrun. Imports no torch before the flags are right."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from deitfast.errors import DeitfastError, unknown_argument
from deitfast.guard import guarded, trains
from deitfast.recipe import Recipe, flag
from deitfast.training.trackers import TRACKERS, chosen_trackers

if TYPE_CHECKING:
    from deitfast.training.train import Result


_SECTIONS = {
    "model": "what is trained", "optimizer": "optimisation", "drop_path": "regularisation",
    "distillation": "distillation", "repeats": "augmentation", "eval_crop_ratio": "evaluation", "out": "this machine",
}  # fmt: skip
"""The first field of each of the recipe's sections, and its heading in --help."""
_ALSO = {"init": ("--weights",), "fused": ("--choices",)}
"""Second names of flags: what weights are called in every other command, and a run's choices of kernels to repeat."""


class _Parser(argparse.ArgumentParser):
    """argparse that raises DeitfastError, in one line, with the nearest flag's name."""

    def error(self, message: str) -> NoReturn:
        raise DeitfastError(message)


def parse_flags(base: Recipe, arguments: Sequence[str], *, prog: str = "") -> Recipe:
    """`base` with the fields given as flags replaced, checked.

    Flags are the field names with dashes; booleans are `--flag` and `--no-flag`. Five more are the command's:
    `--scale-lr` gives the batch the learning rate that belongs to it, the others are for `run`. Unknown and mistyped
    ones raise DeitfastError with the nearest name. `--help` prints them with `base`'s values and exits.
    """
    return _applied(_flags_of(base, prog), base, arguments)[0]


def _flags_of(base: Recipe, prog: str = "", description: str = "") -> _Parser:
    parser = _Parser(
        prog=prog or None, usage="%(prog)s [--flag VALUE ...]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    section: argparse._ActionsContainer = parser
    for f in fields(Recipe):
        if f.name in _SECTIONS:
            section = parser.add_argument_group(_SECTIONS[f.name])
        value = getattr(base, f.name)
        text = f"{f.metadata['help']} [{value if value != '' else 'none'}]".replace("%", "%%")
        if isinstance(value, bool):
            section.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, default=value, help=text)
        else:
            names = [flag(f.name), *_ALSO.get(f.name, ())]
            section.add_argument(*names, type=type(f.default), default=value, help=text, metavar="", dest=f.name)
    command = parser.add_argument_group("this command")
    command.add_argument(
        "--scale-lr",
        action="store_true",
        help=f"lr {base.lr:g} x batch / {base.batch} (for LAMB x the square root), instead of --lr",
    )
    command.add_argument(
        "--smoke",
        action="store_true",
        help="prove the installation: 3 small steps, save, resume, evaluate; leaves nothing behind",
    )
    command.add_argument(
        "--stage",
        type=Path,
        default=None,
        metavar="DIR",
        help="copy the data to DIR, on a disk of each machine, while training, and read the copies that are there",
    )
    command.add_argument(
        "--track",
        default="",
        metavar="NAMES",
        help=f"send the numbers of metrics.jsonl on to one or several of {','.join(TRACKERS)}",
    )
    command.add_argument(
        "--profile",
        type=Path,
        default=None,
        metavar="DIR",
        help="trace a few steps into DIR, as a Chrome trace and a table, and end; trains nothing",
    )
    return parser


def _applied(parser: _Parser, base: Recipe, arguments: Sequence[str]) -> tuple[Recipe, argparse.Namespace]:
    """`base` with what the arguments say, and all that was said."""
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise unknown_argument(unknown[0], parser._option_string_actions)
    chosen = replace(base, **{f.name: getattr(known, f.name) for f in fields(Recipe)})
    if known.scale_lr:
        if chosen.lr != base.lr:
            raise DeitfastError("--lr is final, --scale-lr computes it from the recipe's. Give one of them")
        chosen = replace(chosen, lr=base.ruled_lr(chosen.batch))
    return chosen, known


def share_cores_politely() -> None:
    """Let PyTorch's idle CPU threads sleep instead of spin; to be called before torch is imported.

    Spinning threads take the cores from DALI's decoders and from any other process: on two cores beside one other busy
    process the digits recipe ran at 450 images/s with sleeping threads and at 55 to 210 with spinning ones.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _without_downloads(chosen: Recipe, base: Recipe) -> Recipe:
    """For a smoke test: what the recipe's file names, and the command line does not, and is not on this machine yet."""
    told = []
    if chosen.init and chosen.init == base.init and not Path(chosen.init).exists():
        told.append(f"no weights at {chosen.init} yet: the smoke test starts from fresh ones")
        chosen = replace(chosen, init="", reset_head=False)
    if chosen.teacher and chosen.teacher == base.teacher:
        told.append(f"an untrained teacher stands in for {chosen.teacher}; --teacher tries another")
        chosen = replace(chosen, teacher="deit_tiny_patch16_224:fresh")
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(told), end="\n" * bool(told))
    return chosen


def train(recipe: Recipe, track: str = "") -> Result:
    """Train `recipe` to its end and return its scores; what files in recipes/ do, from Python.

    recipe: its `data` must be given; where its `out` is empty, the run folder is runs/<model>. Everything that the run
        writes lies there, and the same call goes on from the newest checkpoint in it.
    track: `tensorboard`, `wandb`, `trackio` or several, with commas: they get the run's numbers, too.

    This process is the only one, or one of those that torchrun started. Progress is printed.

    Raises DeitfastError for what its user can mend, and SystemExit(75) after a SIGTERM, with everything saved.
    """
    recipe = replace(recipe, out=recipe.out or f"runs/{recipe.model}")
    recipe.check()
    trackers = chosen_trackers(track)
    share_cores_politely()
    from deitfast.training import train as training

    result = training.train(recipe, track=trackers)
    assert result is not None, "only a run that is stopped early has no result"
    return result


def run(recipe: Recipe, *, name: str, description: str = "", arguments: Sequence[str] | None = None) -> None:
    """What a file in recipes/ calls: apply the command line to its recipe and train.

    name: the default run folder's name. description: the file's docstring, printed by --help. arguments: the flags, in
    place of the command line's.
    """
    trains()
    arguments = sys.argv[1:] if arguments is None else arguments

    def main() -> None:
        parser = _flags_of(recipe, description=description)
        chosen, said = _applied(parser, recipe, arguments)
        chosen = replace(chosen, out=chosen.out or f"runs/{name}")
        if said.smoke:
            chosen = _without_downloads(chosen, recipe)
        chosen.check()
        trackers = chosen_trackers(said.track)
        share_cores_politely()
        from deitfast.training.train import smoke, train

        if said.profile:
            from deitfast.training.profiling import profile

            table = profile(chosen, said.profile)
            if os.environ.get("RANK", "0") == "0":
                print(f"{table}\n{said.profile}/trace.json opens in chrome://tracing or Perfetto")
        elif said.smoke:
            smoke(chosen)
        else:
            train(chosen, stated=recipe, stage=said.stage, track=trackers)

    guarded(main)
