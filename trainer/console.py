"""What a person sees: lines on stdout, warnings on stderr, a live bar on a terminal only.

Everything goes through the logger "podlift", so that a launcher can add a file to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

_log = logging.getLogger("podlift")


class _Terminal(logging.Handler):
    """Prints info to stdout and the rest to stderr, above the live bar where there is one."""

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.bar is not None and record.levelno < logging.WARNING:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
            try:
                print(text, file=stream, flush=True)
            except BrokenPipeError:
                # Nobody reads any more (`| head`): no reason to stop training, nor to complain at
                # the exit of what could not be written.
                with contextlib.suppress(OSError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (OSError, ValueError, AttributeError):  # a closed terminal, or none at all
                pass


_terminal = _Terminal()


def open_terminal() -> None:
    """Shows the log on the terminal; called by whoever starts a run, any number of times."""
    if _terminal not in _log.handlers:
        _log.addHandler(_terminal)
        _log.setLevel(logging.INFO)
        _log.propagate = False
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """One line for the person who watches."""
    _log.info(text)


def warn(text: str) -> None:
    """One line about something that is not as it should be, while the run goes on."""
    _log.warning("warning: %s", text)


class Bar:
    """A live progress bar where stdout is a terminal; nothing elsewhere."""

    def __init__(self, step: int, stop: int) -> None:
        self._progress: Any = None
        if not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stdout),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=stop, completed=step)
        self._progress.start()
        _terminal.bar = self._progress

    def update(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = _terminal.bar = None


def duration(seconds: float) -> str:
    """`0:01:20`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
