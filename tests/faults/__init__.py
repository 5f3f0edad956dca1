"""Faults done to real runs, and what must come of them: `python -m tests.faults` (`make test-faults`).

`harness` starts, watches and compares runs; `processes` (killed, stopped and hung processes, signals), `resumes` (going
on: again and again, elsewhere, after NaN), `disk` (damage, full disks, lost folders), `hostile` (bad images, crafted
files) and `nodes` (two machines and the link between them) hold a function a row. A row raises AssertionError where it
fails and returns what it measured. The numbers are those of docs/reliability.md.
"""
