r"""Output on the terminal: messages on stdout, warnings on stderr.

The output of a run passes through the logger "podlift", to which a launcher can add a log file.
Text from elsewhere (names of files, configs, errors of other programs) cannot move the cursor or
change what stands above it: control characters are shown, as `\x1b`. Where output is lost, a run
continues, and a command whose result it is fails.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import sys
from typing import Any, TextIO

_log = logging.getLogger("podlift")

# C0 and C1 without tab and newline, DEL, and the marks that reorder text (Unicode TR 9).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# "Select graphic rendition" of ECMA-48: colours and weights, and nothing else.
_COLOR = re.compile("(\x1b\\[[0-9;:]*m)")
_PLAIN = "\x1b[0m"


def escape(text: str, *, colors: bool = False) -> str:
    r"""The text with its control characters, except tab and newline, as `\x1b`.

    Args:
        text: of any origin.
        colors: whether to leave sequences that only select colours, and end their effect.
    """
    if colors and _COLOR.search(text):
        parts = _COLOR.split(text)
        parts[::2] = map(escape, parts[::2])
        return "".join(parts) + _PLAIN * (parts[-2] != _PLAIN)
    return _CONTROL.sub(_as_digits, text.replace("\r\n", "\n"))


def _as_digits(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class OutputLost(OSError):
    """The result of a command could not be written to stdout."""


class _Unfailing(io.FileIO):
    """A standard stream whose writes never raise: what it does not take is dropped.

    Attributes:
        error: the last error, unless nobody reads the stream (`| head`).
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Writes everything, also where the stream does not block."""
        rest = memoryview(data).cast("B")
        size = rest.nbytes
        try:
            while rest:
                count = super().write(rest)
                if count is None:  # full
                    select.select([], [self], [])
                rest = rest[count or 0 :]
        except BrokenPipeError:
            pass
        except OSError as error:
            self.error = error
        return size


def guard_streams() -> None:
    """Makes the standard streams safe to use; the first call of an entry point.

    A print of user code must not end a run because a disk is full or a `| head` has left.
    """
    _fill_streams()
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    for number, name in ((1, "stdout"), (2, "stderr")):
        guarded = _guard(number, getattr(sys, name))
        setattr(sys, name, guarded)
        setattr(sys, f"__{name}__", guarded)


def _fill_streams() -> None:
    """Opens /dev/null where a standard stream is closed (`>&-`).

    The next file that is opened would get its number, and take what libraries in C print there.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(opened, True)
    os.close(opened)


def _guard(number: int, stream: TextIO | None) -> TextIO:
    raw = _Unfailing(number, "w", closefd=False)
    unbuffered, lines, encoding = False, number == 2, None
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):
            stream.flush()
        unbuffered, lines, encoding = stream.write_through, stream.line_buffering, stream.encoding
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=lines,
        write_through=unbuffered,
    )


def show(text: str, *, end: str = "\n") -> None:
    """Prints the result of a command to stdout.

    Raises:
        OutputLost: it cannot be written, for example because a disk is full.
    """
    print(escape(text), end=end, flush=True)
    check_output()


def check_output() -> None:
    """Raises OutputLost if stdout did not take all that was printed so far."""
    buffer = getattr(sys.stdout, "buffer", None)
    error = getattr(getattr(buffer, "raw", buffer), "error", None)
    if error is not None:
        raise OutputLost(error.errno, f"stdout cannot be written: {error.strerror}")


def complain(text: str) -> None:
    """Prints to stderr what keeps a command from its work."""
    with contextlib.suppress(OSError):
        print(escape(text), file=sys.stderr, flush=True)


class _Terminal(logging.Handler):
    """Prints messages to stdout and warnings to stderr, above the live view if there is one."""

    console: Any = None
    warnings = False

    def emit(self, record: logging.LogRecord) -> None:
        text = escape(self.format(record))
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
        _fill_streams()
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
