"""What every command but `train` does around its work: --help, errors and exit codes."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence

from launcher import exit_codes
from trainer.console import OutputLost, check_output, complain, show
from trainer.errors import StorageFailed, UserError


class CommandFailed(Exception):
    """The command cannot do what it was asked to do. The text is printed; the exit code is 1."""


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether any argument is --help, in one of absl's spellings."""
    return any(re.fullmatch(r"--?(help|helpshort|helpfull|h)", argument) for argument in argv)


def run_command(argv: Sequence[str], usage: str, work: Callable[[Sequence[str]], None]) -> int:
    """Runs a command; returns the exit code.

    Args:
        argv: the arguments after the command's name.
        usage: what --help prints.
        work: does what the arguments ask for. It raises UserError or CommandFailed.
    """
    try:
        if asks_for_help(argv):
            show(usage, end="")
        else:
            work(argv)
            check_output()
    except UserError as error:
        complain(f"error: {error}")
        return exit_codes.USAGE
    except StorageFailed as error:
        complain(f"error: {error}")
        return exit_codes.RETRY
    except CommandFailed as error:
        complain(str(error))
        return exit_codes.FAILED
    except OutputLost as error:
        complain(f"error: {error.strerror}")
        return exit_codes.FAILED
    except KeyboardInterrupt:
        complain("stopped")
        return 128 + signal.SIGINT
    return exit_codes.DONE
