"""Runs that are started, watched, hurt and compared."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Every mechanism that could break exactness is on. 20 steps of a small model: a run takes seconds.
FLAGS = {
    "model": "deit_digits_patch4_16", "data": "digits", "epochs": 1, "batch": 64, "micro-batch": 16, "repeats": 3,
    "warmup-epochs": 0.5, "drop-path": 0.2, "ema-decay": 0.9, "mix-group": 8, "workers": 1, "log-every": 1,
    "save-minutes": 0, "clip-norm": 1.0, "distillation": "soft", "teacher": "deit_digits_patch4_16:fresh",
}  # fmt: skip
STEPS = 20
NOT_RUN = "not run: "
"""How the answer of a row begins that this machine cannot run."""

PATIENCE_S = 600.0  # of the harness, on a machine that does other things too


class Launched:
    """A run under its launcher. `text()` is what it printed."""

    def __init__(self, out: Path, command: list[str], said: Path | None = None) -> None:
        self.out, self.log = out, said or out.with_name(out.name + ".said")
        self._file = open(self.log, "ab")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command, stdout=self._file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self) -> int:
        """The launcher's exit code, once it has ended."""
        code = self.process.wait(timeout=PATIENCE_S)
        self._file.close()
        return code

    def workers(self) -> list[int]:
        """Process ids of the ranks, by rank."""
        found = []
        for pid in children(self.process.pid):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [entry.removeprefix(b"RANK=") for entry in environment if entry.startswith(b"RANK=")]
            if ranks:
                found.append((int(ranks[0]), pid))
        return [pid for _, pid in sorted(found)]

    def end(self) -> None:
        """Leave nothing behind, whatever came before."""
        for pid in [*self.workers(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._file.close()


def start(
    out: Path, processes: int = 2, restarts: int = 3, recipe: object = "deit_digits", launcher: tuple[str, ...] = (),
    said: Path | None = None, **changes: object,
) -> Launched:  # fmt: skip
    """`deitfast train` with `FLAGS` and `changes` (by the flag's name, underscores for dashes; None leaves one out).

    recipe: a name or a file. launcher: more flags for the launcher. said: file of what it prints; beside `out`.
    """
    flags = FLAGS | {name.replace("_", "-"): value for name, value in changes.items()}
    given = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value is not None
    ]
    command = [sys.executable, "-m", "deitfast", "train", str(recipe), f"--processes={processes}"]
    return Launched(out, [*command, f"--restarts={restarts}", *launcher, *given, f"--out={out}"], said)


@contextmanager
def running(out: Path, processes: int = 2, restarts: int = 3, **changes: object) -> Iterator[Launched]:
    """`start`, ended at the latest here."""
    run = start(out, processes, restarts, **changes)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        run.end()


def train(out: Path, processes: int = 2, **changes: object) -> None:
    """A run that nothing happens to, and that is not started again."""
    with running(out, processes, restarts=0, **changes) as run:
        code = run.wait()
        assert code == 0, run.text()[-2000:]


# A recipe file: that of the digits, changed so that a fault happens where it should.
RECIPE = """
import os
import signal
import time
from functools import partial
from pathlib import Path

from deitfast import run
from deitfast.engine.engine import FlatEngine
from deitfast.training import train as training
from deitfast.use import evaluate
from deitfast.recipes.deit_digits import RECIPE

{change}
run(RECIPE, name="changed")
"""
STOPPING = "training.train = partial(training.train, stop_at={step})"


def changed(folder: Path, change: str) -> Path:
    """A recipe file with these lines before its run."""
    path = folder / f"changed-{len(list(folder.glob('changed-*')))}.py"
    path.write_text(RECIPE.format(change=change))
    return path


def stop_after(out: Path, *steps: int, processes: int = 2, **changes: object) -> None:
    """Start the run once for each of `steps`, after which it saves and ends."""
    for step in steps:
        train(out, processes, recipe=changed(out.parent, STOPPING.format(step=step)), **changes)
        assert reached(out)["step"] == step


_REFERENCES: dict[str, Path] = {}


def reference(folder: Path, processes: int = 2, **changes: object) -> Path:
    """The run folder of an uninterrupted run of these settings; made once."""
    key = f"{processes}{sorted(changes.items())}"
    if key not in _REFERENCES:
        _REFERENCES[key] = folder / f"whole-{len(_REFERENCES)}"
        train(_REFERENCES[key], processes, **changes)
    return _REFERENCES[key]


def reached(out: Path) -> dict:
    """progress.json; zeros before there is one."""
    try:
        return json.loads((out / "progress.json").read_bytes())
    except (OSError, ValueError):
        return {"step": 0, "saved": None, "running": False}


def until(
    condition: Callable[[], object], what: str, run: Launched | None = None, seconds: float = PATIENCE_S
) -> float:
    """Wait for `condition`; the seconds it took. Fails with what the run said."""
    began = time.monotonic()
    while not condition():
        said = run.text()[-2000:] if run else ""
        assert time.monotonic() - began < seconds, f"never {what}\n{said}"
        assert run is None or run.process.poll() is None, f"ended ({run.process.returncode}), never {what}\n{said}"
        time.sleep(0.01)
    return time.monotonic() - began


def until_step(run: Launched, step: int) -> float:
    """Wait until `step` is done; the seconds it took."""
    return until(lambda: reached(run.out)["step"] >= step, f"at step {step}", run)


def state(out: Path) -> dict[str, str]:
    """Hashes of the newest checkpoint's tensor files."""
    newest = out / "ckpt" / (out / "ckpt" / "latest").read_text()
    return {p.name: hashlib.sha256(tensors_of(p)).hexdigest() for p in sorted(newest.glob("*.safetensors"))}


def tensors_of(path: Path) -> bytes:
    """The tensors' bytes behind the header, in whose order of metadata two files may differ."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def metrics(out: Path, key: str) -> list[dict]:
    """The lines of metrics.jsonl that have `key`."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out, "loss")]


def assert_same(one: Path, two: Path, *, losses_too: bool = True) -> None:
    """Weights, average and optimiser bit by bit, and the losses of all steps."""
    assert state(one) == state(two)
    if losses_too:
        assert losses(one) == losses(two)


def faults(out: Path, kind: str) -> list[dict]:
    path = out / "faults.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def flip_bit(path: Path, chooser: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
    path.write_bytes(data)


def children(pid: int) -> list[int]:
    """Process ids of all descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    found, edge = [], [pid]
    while edge:
        edge = [child for child, parent in parents.items() if parent in edge]
        found += edge
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
