"""Exceptions of a user's code: the message, the place in that code, and who raised them."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import first_line, text_of

_ROOT = Path(__file__).parents[2]
_PODLIFT = (f"{_ROOT / 'launcher'}{os.sep}", f"{_ROOT / 'trainer'}{os.sep}")
_LIBRARIES = (sysconfig.get_path("stdlib"), *_PODLIFT)
# By name: there are several where a virtual environment includes the packages of the system.
_INSTALLED = ("site-packages", "dist-packages")


# Where errors about a lost peer come from.
_JAX = ("jax", "jaxlib")


def cause_of(error: BaseException) -> BaseException:
    """The error that the user's code raised: Python turns a StopIteration into a RuntimeError."""
    is_turned = isinstance(error.__cause__, (StopIteration, StopAsyncIteration))
    if is_turned and isinstance(error, RuntimeError) and error.__cause__ is not None:
        return error.__cause__
    return error


def message_of(error: BaseException) -> str:
    """The message of an exception; if it has none, the user's line that raised it."""
    text = text_of(error)
    if text != type(error).__name__:
        return text
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if not _is_library(frame.filename)]
    return "".join(map(_place, (own or frames)[-1:])) or "it has no message"


def is_of_jax(error: BaseException) -> bool:
    """Whether jax or podlift raised an exception, rather than the user's code and its libraries.

    jax's own type counts wherever it is raised; jax removes its frames from tracebacks.
    """
    if any(base.__module__.split(".")[0] in _JAX for base in type(error).__mro__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    raiser = frames[-1].filename
    return raiser.startswith(_PODLIFT) or any(name in Path(raiser).parts for name in _JAX)


def describe(what: str, error: BaseException, environ: Mapping[str, str], hint: str = "") -> str:
    """The error, the user's line that raised it, and a hint.

    Args:
        what: what failed, for the first words of the message.
        error: the exception.
        environ: with PODLIFT_TRACEBACK set, the text begins with the whole traceback.
        hint: what to do about it.
    """
    cause = cause_of(error)
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    name, message = type(cause).__name__, first_line(cause)
    text = f"error: {what}: {name}{f': {message}' if message != name else ''}"
    # Where no line is the user's, the last line of podlift's own models is the nearest.
    parts = [os.sep.join(("", "trainer", part)) for part in ("models", "losses", "metrics")]
    models = [f for f in frames if any(part in f.filename for part in parts)]
    for frame in (own or models)[-1:]:
        text += f"\n  {_place(frame)}"
    if environ.get("PODLIFT_TRACEBACK"):
        return "".join(traceback.format_exception(error)) + text
    more = "PODLIFT_TRACEBACK=1 shows the whole traceback"
    return f"{text}\n  HINT: {hint}; {more}" if hint else f"{text}\n  HINT: {more}"


def _place(frame: traceback.FrameSummary) -> str:
    """`at mine/data.py:7, in load: assert len(x) == len(y)`."""
    source = linecache.getline(frame.filename, frame.lineno or 0).strip()
    place = os.path.relpath(frame.filename)
    return f"at {place}:{frame.lineno}, in {frame.name}: {source}"


def _is_library(filename: str) -> bool:
    if filename.startswith((*_LIBRARIES, "<")):
        return True
    return any(name in Path(filename).parts for name in _INSTALLED)
