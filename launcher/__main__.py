"""`python -m launcher` and the command `podlift`."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point; exits with the codes of `launcher.exit_codes`."""
    from absl import app

    from launcher import flags, worker

    # A user's own package is named by import path, from the folder the command is run in. `python
    # -m` puts that folder first already; the installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    app.run(lambda options: worker.run(options), flags_parser=flags.parse_or_exit)


if __name__ == "__main__":
    main()
