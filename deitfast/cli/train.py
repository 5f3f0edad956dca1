"""`deitfast train`: a recipe under torchrun, one process a GPU, started again when a process dies.

Exit codes, torchrun's own being 1 for everything: 0 done; 2 a mistake, told in one line; 3 it would end the same way
again; 75 stopped by a signal and saved, the same command resumes; 1 everything else.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from deitfast.cli.recipes import find_recipe, is_recipe, shipped_recipes
from deitfast.errors import EXIT_HOPELESS, EXIT_INTERRUPTED, EXIT_USER_ERROR, DeitfastError, first_line, say
from deitfast.guard import EXIT_FILE, TRAINED, WIRE

_PORT = 29400
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add `train`, which passes the flags that it does not know to the recipe."""
    parser = commands.add_parser(
        "train",
        help="run a recipe under torchrun: deitfast train deit_base --data DIR",
        add_help=False,  # `deitfast train RECIPE --help` is the recipe's
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="shipped recipes:\n" + "\n".join(f"  {name}" for name in shipped_recipes()),
    )
    parser.add_argument(
        "recipe", nargs="?", help="a shipped recipe's name or a file of your own; the flags after it are the recipe's"
    )
    parser.add_argument("--processes", type=int, default=0, help="processes on this machine; 0: one a GPU, or one")
    parser.add_argument(
        "--restarts", type=int, default=3, help="how often the run starts again when a process dies or hangs [3]"
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines; the same command on each, with --master")
    parser.add_argument(
        "--wire", choices=("fp32", "bf16"), default="", help="dtype in which gradients are summed over processes [fp32]"
    )
    parser.add_argument("--master", default="", help="HOST or HOST:PORT of one of several machines")
    parser.set_defaults(run=_train, passes_on=True)


def _train(args: argparse.Namespace, flags: list[str]) -> None:
    if args.recipe is None and set(flags) <= {"-h", "--help"}:
        args.parser.print_help()
        return
    file = find_recipe(_recipe_first(args.recipe, flags))
    if (args.nodes > 1) != bool(args.master):
        raise DeitfastError("--nodes N and --master HOST belong together: give both, the same on every machine")
    if {"-h", "--help"} & set(flags):  # told once, by one process that needs no torch
        sys.exit(subprocess.run([sys.executable, str(file), *flags]).returncode)
    import torch

    processes = args.processes or torch.cuda.device_count() or 1
    if args.wire:
        os.environ[WIRE] = args.wire
    where = ["--standalone"]
    if args.master:
        host, _, port = args.master.partition(":")
        endpoint = f"{host}:{port or _PORT}"
        where = [f"--nnodes={args.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=deitfast"]
    _launch([*where, f"--nproc-per-node={processes}", f"--max-restarts={args.restarts}", str(file), *flags], file)


def _recipe_first(given: str | None, flags: list[str]) -> str:
    """`given`, where it is not the value of a flag that came before the recipe."""
    after = next((word for word in flags if is_recipe(word)), None)
    if given is None or (after and not is_recipe(given)):
        raise DeitfastError(f"the recipe comes first: deitfast train {after or 'RECIPE'} --data DIR")
    return given


def _launch(arguments: list[str], file: Path) -> None:
    """torchrun in this process, with an exit code that says why a run ended. file: the recipe's."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    # Workers that share the launcher's store meet what is left of the last attempt there: of 8 restarts 2 hung and 4
    # needed another one; with stores of their own all 8 recovered at once.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # A signal to the launcher reaches the workers. What nohup has it ignore stays ignored.
    heard = [s.name for s in _PASSED_ON if signal.getsignal(s) is not signal.SIG_IGN]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(heard))  # torchrun's flag of that name
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="deitfast-") as folder:
        end = Path(folder) / "exit"
        os.environ[EXIT_FILE] = str(end)
        try:
            torchrun(arguments)
            if not end.with_name(TRAINED).exists():
                raise DeitfastError(f"{file} ended without training. A recipe ends with run(Recipe(...), name=...)")
        except SignalException:  # from outside, or from a worker that ended on purpose
            sys.exit(_left_behind(end) or EXIT_INTERRUPTED)
        except RendezvousError as error:  # the link is cut for longer than the launchers wait for each other
            if code := _left_behind(end):
                sys.exit(code)
            say(f"another machine's launcher is out of reach ({first_line(error)}). The same command on all resumes")
            sys.exit(1)
        except ChildFailedError as error:
            _, first = error.get_first_failure()
            if code := _left_behind(end):
                sys.exit(code)
            if first.exitcode in (EXIT_USER_ERROR, EXIT_HOPELESS, EXIT_INTERRUPTED):
                sys.exit(first.exitcode)
            how = f"killed by signal {-first.exitcode}" if first.exitcode < 0 else f"exit code {first.exitcode}"
            say(f"process {first.local_rank} ended ({how}), no restart is left. The same command resumes")
            sys.exit(1)


def _left_behind(end: Path) -> int:
    """The exit code that a worker left for its launcher; 0 where none did."""
    try:
        return int(end.read_text())
    except (OSError, ValueError):
        return 0
