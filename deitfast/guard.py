"""Where every command starts: a user's mistake becomes one line and an exit code. Imports no torch."""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from deitfast.errors import EXIT_INTERRUPTED, DeitfastError

EXIT_FILE = "DEITFAST_EXIT_FILE"
"""Environment variable: file in which a process that ends on purpose leaves its exit code for the launcher."""
WIRE = "DEITFAST_WIRE"
"""Environment variable: the dtype in which gradients are summed over the processes, fp32 (where unset) or bf16."""
TRAINED = "trained"
"""Name of the file beside it that says that training was asked for."""

_LET_IT_SPEAK_S = 2.0


def trains() -> None:
    """Tell the launcher, where there is one, that its file trains: one that does not ends in silence."""
    if path := os.environ.get(EXIT_FILE):
        with suppress(OSError):
            Path(path).with_name(TRAINED).touch()


def guarded(main: Callable[[], None]) -> None:
    """Run a command: a DeitfastError becomes one line on stderr and its exit code (2; 3 where it would come again).

    Under torchrun such an end, and one with exit code 75, is final: the launcher starts nothing again.
    """
    quiet_pillow()
    atexit.register(gc.freeze)  # or Python looks for rubbish among all that torch is, 0.5 s of a training process's end
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed pipe is expected
    except DeitfastError as error:
        if not str(error):  # another process tells it, and torchrun kills the rest when the first one exits
            time.sleep(_LET_IT_SPEAK_S)
        elif _started() or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        _tell_torchrun(str(error))
        if error.exit_code != 1:  # with 1 another process has crashed, which may not come again
            _call_off_restarts(error.exit_code)
        _leave(error.exit_code)
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            _call_off_restarts(EXIT_INTERRUPTED)
        raise
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush goes nowhere
        _leave(0)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        if not _started():
            raise
        traceback.print_exc()
        _leave(1)
    finally:
        if _started():
            sys.modules["torch.distributed"].destroy_process_group()


def quiet_pillow() -> None:
    """Keep Pillow's warnings of this process off the screen: what it remarks on, we tell by name where it matters."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def leave_now(code: int, *, final: bool = False) -> None:
    """End this process from any of its threads, whatever the others do. final: the launcher starts nothing again."""
    if final:
        _call_off_restarts(code)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def restarts_left() -> int:
    """How often torchrun would start this process again."""
    maximum, done = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("MAX_RESTARTS", "RESTART_COUNT"))
    return int(maximum) - int(done)


def _call_off_restarts(code: int) -> None:
    """Leave `code` for the launcher, and end torchrun, which takes every exit for a crash and would start again.

    The first process of a machine to come here does it; it is torchrun's own child, so that torchrun hears of it
    before it sees the process end.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    attempt = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "/nowhere/0/error.json")).parent.parent
    try:
        with open(os.environ.get(EXIT_FILE) or attempt / "ended", "x") as file:
            file.write(str(code))
    except FileExistsError:
        return
    except OSError:
        if os.environ.get("LOCAL_RANK") != "0":
            return
    if restarts_left() > 0:
        os.kill(os.getppid(), signal.SIGTERM)


def _leave(code: int) -> None:
    """End this process at once where there are others.

    They may be in a collective that it will not join: whoever waits for them, as the end of a process group does, waits
    for the watchdog. torchrun ends them.
    """
    if _started():
        leave_now(code)


def _tell_torchrun(message: str) -> None:
    """Have torchrun's own report end with the message instead of `error_file: <N/A>` or our call stack."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and message:
        facts = {"py_callstack": f"none, a mistake in the input: {message}", "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": facts}}))


def _started() -> bool:
    """Whether the processes have joined: before that they all make the same mistake, and one of them tells it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
