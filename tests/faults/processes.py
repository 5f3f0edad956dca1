"""Rows 1, 3, 4, 15, 16: processes that are killed, stopped, asked to stop, hang, or crash."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.faults.harness import (
    STEPS,
    alive,
    assert_same,
    faults,
    losses,
    reached,
    reference,
    running,
    train,
    until,
    until_step,
)  # fmt: skip


def killed_rank(folder: Path, count: int) -> str:
    """Row 1: SIGKILL a rank at random steps of one run; it starts again each time and ends bitwise equal."""
    whole, out, chooser = reference(folder), folder / "killed", random.Random(count)
    steps = sorted(chooser.sample(range(2, STEPS - 1), count))
    seconds: list[float] = []
    with running(out, restarts=count) as run:
        for step in steps:
            until_step(run, step)
            victim = run.workers()[chooser.randrange(2)]
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            until(lambda victim=victim: not alive(victim), "dead")
            until_step(run, min(reached(out)["step"] + 1, STEPS))
            seconds.append(time.monotonic() - began)
        assert run.wait() == 0, run.text()[-3000:]
    assert_same(whole, out)
    crashes = len(faults(out, "crash"))
    assert crashes == count, f"{crashes} starts died, {count} kills"
    return f"{count} kills, {count} restarts, {min(seconds):.1f} to {max(seconds):.1f} s to the next step, bitwise"


def killed_launcher(folder: Path, count: int) -> str:
    """Row 3: workers gone in 5 s, a second start refused while the first one holds the folder, resumed bitwise."""
    whole, out, slowest = reference(folder), folder / "launcher", 0.0
    for turn in range(count):
        with running(out) as run:
            until_step(run, 3 + turn)
            if turn == 0:
                for pid in run.workers():
                    os.kill(pid, signal.SIGSTOP)  # so that it is not over before the second has started
                with running(out, processes=1) as second:
                    code, said = second.wait(), second.text()
                assert code == 2, said
                assert "locked by pid" in said, said
            workers = run.workers()
            os.kill(run.process.pid, signal.SIGKILL)
            slowest = max(slowest, until(lambda workers=workers: not any(map(alive, workers)), "gone", seconds=60))
    assert slowest < 5, f"workers lived on for {slowest:.1f} s"
    train(out)
    assert_same(whole, out)
    return f"{count} kills: workers gone in {slowest:.2f} s, second start refused (exit 2), bitwise"


SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def asked_to_stop(folder: Path, count: int) -> str:
    """Row 4: every signal, to the launcher and to one rank, with restarts on: saved in 10 s, exit 75, bitwise."""
    whole, chooser, slowest, stops = reference(folder), random.Random(4), 0.0, 0
    for turn in range(count):
        out = folder / f"asked-{turn}"
        for name in SIGNALS:
            with running(out) as run:
                until_step(run, reached(out)["step"] + 2)
                to = run.process.pid if turn % 2 == 0 else run.workers()[chooser.randrange(2)]
                began = time.monotonic()
                os.kill(to, getattr(signal, name))
                run.wait()
                slowest = max(slowest, time.monotonic() - began)
                assert run.wait() == 75, f"{name}: {run.process.returncode}\n{run.text()[-3000:]}"
                assert f"{name}: saved at step" in run.text(), run.text()[-3000:]
                stops += 1
        train(out)
        assert_same(whole, out)
        assert not faults(out, "crash")
    return f"{stops} stops by {', '.join(SIGNALS)}: saved and ended in at most {slowest:.1f} s, exit 75, bitwise"


def asked_in_start_up(folder: Path, count: int) -> str:
    """Row 4: a signal before the first step, and a second Ctrl-C: ended at once."""
    out, slowest = folder / "early", 0.0
    for turn in range(count):
        with running(out) as run:
            until(lambda: len(run.workers()) == 2, "two workers", run)
            time.sleep(1.0 + turn)
            began = time.monotonic()
            os.kill(run.process.pid, signal.SIGTERM)
            assert run.wait() == 75, run.text()[-3000:]
            slowest = max(slowest, time.monotonic() - began)
    with running(folder / "twice", save_minutes=1e6) as run:
        until_step(run, 2)
        stopped = run.workers()[1]
        os.kill(stopped, signal.SIGSTOP)  # so that the first Ctrl-C cannot be followed
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(2.0)
        os.kill(stopped, signal.SIGCONT)
        os.kill(run.process.pid, signal.SIGINT)
        began = time.monotonic()
        code = run.wait()
        twice = time.monotonic() - began
        assert code not in (0, 1), code
    return (
        f"{count} in start-up: ended in at most {slowest:.1f} s, exit 75; second Ctrl-C: in {twice:.1f} s, exit {code}"
    )


def hung_rank(folder: Path, count: int, patience: float = 10.0) -> str:
    """Row 15: a stopped rank: told by name, restart within the patience and 45 s, bitwise."""
    whole, slowest = reference(folder), 0.0
    for turn in range(count):
        out = folder / f"hung-{turn}"
        with running(out, patience=patience) as run:
            until_step(run, 4)
            os.kill(run.workers()[1], signal.SIGSTOP)
            slowest = max(slowest, until_step(run, reached(out)["step"] + 1))
            assert run.wait() == 0, run.text()[-3000:]
        assert faults(out, "hang"), run.text()[-3000:]
        assert_same(whole, out)
    assert slowest < patience + 45, slowest
    return f"{count} stopped: next step {slowest:.1f} s later (patience {patience:.0f} s), bitwise"


def same_crash(folder: Path, count: int) -> str:
    """Row 16: the third crash at one step stops the run with exit 3, and names the cause."""
    out, recipe = folder / "same", folder / "crashing.py"
    recipe.write_text(CRASHING)
    with running(out, restarts=9, recipe=recipe) as run:
        code = run.wait()
    assert code == 3, f"{code}\n{run.text()[-3000:]}"
    assert "3 starts in a row ended in step 6" in run.text(), run.text()[-3000:]
    assert "RuntimeError: broken on purpose" in run.text()
    assert len(faults(out, "crash")) == 3
    train(out)  # mended
    assert len(losses(out)) == STEPS
    return "3 crashes at step 6: refused with exit 3, cause named; mended, it ran to its end"


CRASHING = """
import os
from deitfast import run
from deitfast.engine.engine import FlatEngine
from deitfast.recipes.deit_digits import RECIPE

step = FlatEngine.__call__


def broken(self, batches, number, lr):
    if number == 5 and os.environ["RANK"] == "1":
        raise RuntimeError("broken on purpose")
    step(self, batches, number, lr)


FlatEngine.__call__ = broken
run(RECIPE, name="crashing")
"""
