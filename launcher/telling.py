"""What a launcher tells the person who started it."""

from __future__ import annotations

import contextlib
import shlex
import sys

from etils import epath


def show(text: str, *, is_error: bool = True, prefix: str = "") -> None:
    """Writes whole lines to the terminal, at once: other launchers may write to it too.

    Where nobody reads any more (`| head`), it is no reason to stop training.
    """
    stream = sys.stderr if is_error else sys.stdout
    with contextlib.suppress(OSError):
        stream.write(f"{prefix}{text}\n")
        stream.flush()


def how_to_go_on(workdir: str) -> str:
    """One line: the newest checkpoint, and the command that goes on from it."""
    steps = []
    with contextlib.suppress(OSError):
        steps = [
            int(p.name) for p in epath.Path(workdir, "checkpoints").iterdir() if p.name.isdigit()
        ]
    if not steps:
        return (
            "HINT: there is no checkpoint yet, so the same command starts at step 0; "
            "config.checkpoint.every_steps says how often to save"
        )
    again = shlex.quote(f"--workdir={workdir}")
    return f"HINT: the same command with {again} goes on from step {max(steps)}"
