"""A training run: from a recipe's flags to the last checkpoint.

In the order of a run: `launch` (flags, one line a mistake), `train` (the loop, top to bottom), `run` (what a run
consists of; set up, saved, resumed), `run_folder` (log, metrics, settings), `meter` (loss and speed between log steps),
`interrupt` (SIGTERM saves and stops), `checkpoint` (atomic, hashed, exact).
`launch` imports no torch before the flags are right.
"""
