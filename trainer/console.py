"""What a person sees: lines on stdout, warnings on stderr.

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
    """Prints info to stdout and the rest to stderr, above the live view where there is one."""

    console: Any = None
    warnings = False

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        is_info = record.levelno < logging.WARNING
        stream = sys.stdout if is_info else sys.stderr
        try:
            if self.console is not None and (is_info or self.warnings):
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
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


def print_above(console: Any, *, warnings: bool = False) -> None:
    """Prints through a console of rich from now on, above what is live on it; None: directly.

    Args:
        console: of stdout.
        warnings: stderr is the same terminal, so what goes there has to come above too.
    """
    _terminal.console, _terminal.warnings = console, warnings


def duration(seconds: float) -> str:
    """`0:01:20`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
