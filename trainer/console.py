"""Output on the terminal: messages on stdout, warnings on stderr.

All output passes through the logger "podlift", to which a launcher can add a log file.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

_log = logging.getLogger("podlift")


class _Terminal(logging.Handler):
    """Prints messages to stdout and warnings to stderr, above the live view if there is one."""

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
            # The reader is gone (`| head`). Training continues, and nothing must fail at exit when
            # Python flushes the stream.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError, AttributeError):  # the terminal is closed, or there is none
            pass


_terminal = _Terminal()


def open_terminal() -> None:
    """Shows the log on the terminal; every entry point calls it, repeated calls do nothing."""
    if _terminal not in _log.handlers:
        _log.addHandler(_terminal)
        _log.setLevel(logging.INFO)
        _log.propagate = False
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a message, one line."""
    _log.info(text)


def warn(text: str) -> None:
    """Prints a warning, one line; the run continues."""
    _log.warning("warning: %s", text)


def print_above(console: Any, *, warnings: bool = False) -> None:
    """From now on prints through a rich console, above its live display.

    Args:
        console: the console of stdout; None: print directly again.
        warnings: whether to print warnings there too, because stderr is the same terminal.
    """
    _terminal.console, _terminal.warnings = console, warnings


def duration(seconds: float) -> str:
    """`0:01:20`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
