"""The fault matrix: what is done to a run, and what must come of it. `python -m tests.faults` (`make test-faults`).

`harness` starts, watches and compares runs; `processes` (killed, stopped and hung processes, signals, a cut network),
`disk` (damage, full disks, lost folders), `runs` (resumes, world sizes, NaN, bad images, changes), `hostile` (files
made to harm) hold a function a row. A row raises AssertionError where it fails and returns what it measured.
"""
