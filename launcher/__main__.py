"""`python -m launcher` and the command `podlift`."""

from __future__ import annotations

import sys

from launcher.cli.commands import find_command
from trainer.console import guard_streams


def main() -> None:
    """The entry point; exits with the codes of `launcher.exit_codes`."""
    guard_streams()
    # Configs name a user's own package by import path, relative to the current folder. `python -m`
    # puts that folder first already; the installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    command, argv = find_command(sys.argv[1:])
    sys.exit(command.main()(argv))


if __name__ == "__main__":
    main()
