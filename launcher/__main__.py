"""`python -m launcher` and the command `podlift`."""

from __future__ import annotations

import sys

from launcher import exit_codes
from launcher.cli.commands import find_command
from launcher.command_line.parse import expand_flagfiles
from trainer.console import complain, guard_streams
from trainer.errors import UserError


def main() -> None:
    """The entry point; exits with the codes of `launcher.exit_codes`."""
    guard_streams()
    # Configs name a user's own package by import path, relative to the current folder. `python -m`
    # puts that folder first already; the installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        command, argv = find_command(expand_flagfiles(sys.argv[1:]))
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(exit_codes.USAGE)
    sys.exit(command.main()(argv))


if __name__ == "__main__":
    main()
