"""`make test-faults`: faults done to real runs, a row each, with what was measured."""

from __future__ import annotations

import argparse
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.faults import disk, hostile, nodes, processes, resumes

Row = Callable[[Path, int], str]

# (number, fault, row, reduced count, full count)
ROWS: list[tuple[str, str, Row, int, int]] = [
    ("1", "SIGKILL a rank", processes.killed_rank, 2, 20),
    ("2", "SIGKILL in a save", disk.killed_saves, 12, 200),
    ("3", "SIGKILL the launcher", processes.killed_launcher, 1, 5),
    ("4", "signals in training, to launcher and rank", processes.asked_to_stop, 2, 10),
    ("4", "signals in start-up, a second one", processes.asked_in_start_up, 1, 5),
    ("5", "resumes in a row", resumes.resumed, 4, 10),
    ("6", "resumes with the rest on", resumes.everything_on, 2, 6),
    ("7", "saves at odd moments, in evaluation", resumes.saved_anywhere, 1, 1),
    ("8", "2, 1 and 2 processes", resumes.other_worlds, 1, 4),
    ("9", "4, 3, 2 and 1 processes", resumes.many_worlds, 1, 1),
    ("10", "flipped bits", disk.flipped_bits, 20, 100),
    ("11", "lost, cut, stray files and folders", disk.lost_folders, 1, 1),
    ("12", "full disk", disk.full_disk, 1, 3),
    ("13", "NaN", resumes.not_finite, 1, 1),
    ("14", "bad images", hostile.bad_images, 1, 1),
    ("15", "a hung rank", processes.hung_rank, 1, 5),
    ("16", "the same crash three times", processes.same_crash, 1, 1),
    ("17", "recipe, data or code changed", resumes.changed_since, 1, 1),
    ("18", "hostile files", hostile.hostile_files, 150, 1250),
    ("19", "a cut link between two nodes", nodes.cut_link, 1, 5),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="the full counts: hours")
    parser.add_argument("--rows", nargs="*", help="these rows alone, by number")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, under nohup the
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # other one too, and so would the runs
    failed, began = 0, time.monotonic()
    print("| row | fault | verdict | measured | seconds | CPU seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="deitfast-faults-") as folder:
        for number, fault, row, few, many in ROWS:
            if args.rows and number not in args.rows:
                continue
            place, then, used = Path(tempfile.mkdtemp(dir=folder)), time.monotonic(), _cpu_seconds()
            try:
                measured = row(place, many if args.full else few)
                verdict = "pass"
            except Exception as error:
                failed += 1
                verdict, measured = "FAIL", f"{type(error).__name__}: {str(error)[:300]}".replace("\n", " ")
                traceback.print_exc()
            seconds, cpu_seconds = time.monotonic() - then, _cpu_seconds() - used
            measured = measured.replace("|", "/")
            print(f"| {number} | {fault} | {verdict} | {measured} | {seconds:.0f} | {cpu_seconds:.0f} |", flush=True)
    print(f"{failed} failed, {(time.monotonic() - began) / 60:.0f} minutes, {_cpu_seconds() / 60:.0f} of a core")
    raise SystemExit(bool(failed))


def _cpu_seconds() -> float:
    """Of this process and all that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
