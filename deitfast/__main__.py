"""`python -m deitfast`: the command."""

from deitfast.cli.main import main

main()
