"""The launcher's terminal: lines that a thread writes, and the hint on how to resume.

With a thread, a terminal that blocks (Ctrl-S, `less`) holds up neither the workers, nor their
supervision, nor the other launchers. What it does not take in time is dropped and counted: the
logs have it.
"""

from __future__ import annotations

import contextlib
import shlex
import sys

from etils import epath

from launcher.processes.background import BackgroundWriter
from trainer.console import escape

# Bytes of the output of ranks that wait for the terminal; the launcher's own lines may take as much
# again.
_MAX_PENDING = 4_000_000
# Of a line of a rank.
_MAX_SHOWN = 10_000


def print_out(text: str) -> None:
    """Writes the launcher's own lines to stdout, soon."""
    _terminal.print(escape(text), is_error=False, limit=2 * _MAX_PENDING)


def print_err(text: str) -> None:
    """Writes the launcher's own lines to stderr, soon."""
    _terminal.print(escape(text), is_error=True, limit=2 * _MAX_PENDING)


def print_line(line: str, *, is_error: bool) -> None:
    """Writes a line of a rank, soon. It may select colours; a very long one is cut."""
    if len(line) > _MAX_SHOWN:
        line = f"{line[:_MAX_SHOWN]} ... {len(line) - _MAX_SHOWN:,} more characters in the log"
    _terminal.print(escape(line, colors=True), is_error=is_error, limit=_MAX_PENDING)


def flush(seconds: float = 2.0) -> None:
    """Waits until every line is written, or until the time is over."""
    _terminal.flush(seconds)


class _Terminal:
    def __init__(self) -> None:
        self._writer = BackgroundWriter("podlift-terminal")
        self._missing = 0

    def print(self, text: str, *, is_error: bool, limit: int) -> None:
        """Has lines written, unless more than `limit` bytes wait already."""
        # Where lines are missing, it first catches up: one gap is easier to read than many.
        if self._writer.pending > (limit // 2 if self._missing else limit):
            self._missing += 1
            return
        self._tell_what_is_missing()
        self._put(text, is_error=is_error)

    def flush(self, seconds: float) -> None:
        self._tell_what_is_missing()
        self._writer.flush(seconds)

    def _tell_what_is_missing(self) -> None:
        missing, self._missing = self._missing, 0
        if missing:
            text = (
                f"warning: {missing:,} line{'s are' if missing > 1 else ' is'} missing here: the "
                "terminal did not take them in time; the logs of the ranks have their output"
            )
            self._put(text, is_error=True)

    def _put(self, text: str, *, is_error: bool) -> None:
        self._writer.put(lambda: _write_to(text, is_error=is_error), sys.getsizeof(text))


def _write_to(text: str, *, is_error: bool) -> None:
    """Writes in one piece, since other launchers may write to the same terminal."""
    stream = sys.stderr if is_error else sys.stdout
    with contextlib.suppress(OSError, ValueError):  # closed, or `| head`
        if stream is not None:
            encoding = stream.encoding or "utf-8"
            stream.write(f"{text}\n".encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()


_terminal = _Terminal()


def how_to_resume(workdir: str, *, smoke: bool = False, in_memory: bool = False) -> str:
    """One line: the newest checkpoint, and the command that resumes from it.

    Args:
        workdir: the run's folder.
        smoke: whether this is a smoke test.
        in_memory: whether the run may have left an in-memory checkpoint.
    """
    if smoke:
        return "HINT: this was a smoke test; nothing of the run itself was touched"
    steps = []
    with contextlib.suppress(Exception):  # clients of object stores raise many types
        folder = epath.Path(workdir) / "checkpoints"
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    if not steps and in_memory:
        return (
            "HINT: there is no checkpoint yet: the same command resumes from an in-memory "
            "checkpoint if one was saved, or starts at step 0"
        )
    if not steps:
        return (
            "HINT: there is no checkpoint yet, so the same command starts at step 0; "
            "config.checkpoint.every_steps says how often to save"
        )
    again = shlex.quote(f"--workdir={workdir}")
    return f"HINT: the same command with {again} resumes from step {max(steps)}"
