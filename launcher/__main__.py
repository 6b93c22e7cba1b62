"""`python -m launcher` and the command `podlift`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.flags import Options


def main() -> None:
    """The entry point; exits with the codes of `launcher.exit_codes`."""
    # A user's own package is named by import path, from the folder the command is run in. `python
    # -m` puts that folder first already; the installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if sys.argv[1:2] == ["env"]:
        from launcher.bug_report import print_environment

        sys.exit(print_environment())
    from absl import app

    from launcher import flags

    app.run(run, flags_parser=flags.parse_or_exit)


def run(options: Options) -> int:
    """Plans a run and runs it, in place or in processes of its own; returns the exit code."""
    from launcher import exit_codes, plan
    from trainer.console import open_terminal
    from trainer.errors import UserError

    open_terminal()
    try:
        planned = plan.make_plan(options, os.environ)
        if options.dry_run:
            print(plan.describe(planned, os.environ), end="")
            return exit_codes.DONE
        if planned.supervised:
            from launcher.supervisor import supervise

            return supervise(planned)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    from launcher.worker import run_here

    return run_here(planned)


if __name__ == "__main__":
    main()
