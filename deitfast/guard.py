"""Where every command starts: a user's mistake becomes one line and an exit code. Imports no torch."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from deitfast.errors import EXIT_USER_ERROR, DeitfastError

_LET_IT_SPEAK_S = 2.0


def guarded(main: Callable[[], None]) -> None:
    """Run a command: a DeitfastError becomes one line on stderr and exit code 2, told to torchrun too."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what Pillow remarks on, we tell by name where it matters
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
        _leave(EXIT_USER_ERROR)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush goes nowhere
        _leave(0)
    except Exception:
        if not _started():
            raise
        traceback.print_exc()
        _leave(1)
    finally:
        if _started():
            sys.modules["torch.distributed"].destroy_process_group()


def _leave(code: int) -> None:
    """End this process at once where there are others.

    They may be in a collective that it will not join: whoever waits for them, as the end of a process group does, waits
    for the watchdog. torchrun ends them.
    """
    if _started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_torchrun(message: str) -> None:
    """Have torchrun's own report end with the message instead of `error_file: <N/A>` or our call stack."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and message:
        facts = {"py_callstack": f"none, a mistake in the input: {message}", "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": facts}}))


def _started() -> bool:
    """Whether the processes have joined: before that they all make the same mistake, and one of them tells it."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
