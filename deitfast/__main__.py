"""`python -m deitfast`: the command."""

from deitfast.cli.main import main

if __name__ == "__main__":
    main()
