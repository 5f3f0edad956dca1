"""The `deitfast` command. Nothing heavy is imported before a sub-command needs it, so --help answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from deitfast.errors import EXIT_USER_ERROR, DeitfastError, did_you_mean
from deitfast.guard import guarded
from deitfast.recipe import share_cores_politely


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
    _add_test(commands)
    _add_models(commands)
    known, unknown = parser.parse_known_args(arguments)
    if known.command is None:
        parser.print_help()
        return
    if unknown and known.command != "train":
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


def _add_test(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "test", aliases=["eval"], help="top-1 and top-5 of weights on a validation set", allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="model name")
    parser.add_argument("--weights", default="", help="weight file or checkpoint folder; empty: the published weights")
    parser.add_argument("--data", required=True, help="folder with val/<class>/*, of class folders, or of val shards")
    parser.add_argument("--classes", default=None, choices=["imagenet"], help="class folders are ImageNet synsets")
    parser.add_argument("--image-size", type=int, default=0, help="image side; 0: the model's own")
    parser.add_argument("--eval-crop-ratio", type=float, default=0.875, help="side share the centre crop keeps [.875]")
    parser.add_argument("--batch", type=int, default=64, help="images at once a process [64]")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 on a GPU")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"], help="[auto]")
    parser.add_argument("--workers", type=int, default=0, help="data threads a process; 0: this machine's cores shared")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    parser.set_defaults(run=_test)


def _test(args: argparse.Namespace, _: list[str]) -> None:
    share_cores_politely()
    from deitfast.data import open_dataset
    from deitfast.distributed import start
    from deitfast.evaluate import evaluate
    from deitfast.model import create_model

    world = start(args.device)
    data = world.agree(lambda: open_dataset(args.data, split="val", classes=args.classes, quiet=world.local_rank > 0))
    if data.val is None:
        raise DeitfastError(f"{args.data} has no validation images. Give a folder with val/<class>/*.jpg")
    model = world.agree(
        lambda: create_model(
            args.model, args.weights or True, num_classes=len(data.classes), image_size=args.image_size or None
        )
    ).to(world.device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and world.device.type == "cuda")
    scores = evaluate(
        model, data.val, world,
        crop_ratio=args.eval_crop_ratio, batch=args.batch, workers=args.workers, bf16=bf16,
    )  # fmt: skip
    if world.leads and args.json:
        print(json.dumps({"model": args.model, "weights": args.weights, "data": args.data, **asdict(scores)}))
    elif world.leads:
        print(f"{args.model}: top-1 {scores.top1:.2f} %, top-5 {scores.top5:.2f} % on {scores.images:,} images")


def _add_models(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("models", help="list the models", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace, _: list[str]) -> None:
    from deitfast.zoo import VARIANTS

    if args.json:
        print(json.dumps({name: asdict(variant) for name, variant in sorted(VARIANTS.items())}, indent=1))
        return
    print(f"{'model':34s} {'px':>4s} {'params M':>9s} {'top-1':>6s}  (published, ImageNet-1k)")
    for name, v in sorted(VARIANTS.items()):
        params, top1 = (f"{x:g}" if x else "-" for x in (v.params_millions, v.top1))
        print(f"{name:34s} {v.image_size:4d} {params:>9s} {top1:>6s}")


if __name__ == "__main__":
    main()
