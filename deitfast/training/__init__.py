"""A training run: from a recipe's flags to the last checkpoint.

In the order of a run: `launch` (flags, one line a mistake), `train` (the loop, top to bottom), `run` (what a run
consists of; set up), `resume` (from where; saved and rolled back), `run_folder` with `environment` (what lies there),
`meter` (loss and speed between log steps), `evaluation`, `saving` (in the background) over `checkpoint` (atomic,
hashed, exact). What may go wrong: `interrupt` (signals), `watch` (hanging processes), `faults` (the record).
Beforehand: `estimate`, `profiling`. Afterwards: `run_record` (what a folder tells), `charts`, `report` (report.html).
`launch` imports no torch before the flags are right.
"""
