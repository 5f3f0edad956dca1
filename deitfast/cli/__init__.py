"""The `deitfast` command: `main` dispatches, `train`, `data`, `runs` and `model` hold its sub-commands.

Nothing heavy is imported before a sub-command needs it.
"""
