"""Errors in a user's code, as one line with the place in that code and no traceback."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LIBRARIES = (sysconfig.get_path("stdlib"), str(_ROOT / "launcher"), str(_ROOT / "trainer"))
# By name: there are several where a virtual environment includes the packages of the system.
_INSTALLED = ("site-packages", "dist-packages")


def describe(what: str, error: Exception, environ: Mapping[str, str], hint: str = "") -> str:
    """The error, the user's line that raised it, and a hint.

    Args:
        what: what failed, for the first words of the message.
        error: the exception.
        environ: with PODLIFT_TRACEBACK set, the text begins with the whole traceback.
        hint: what to do about it.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_library(frame.filename)]
    lines = str(error).strip().splitlines() or [""]
    text = f"error: {what}: {type(error).__name__}: {lines[0]}"
    # Where no line is the user's, the last line of podlift's own models is the nearest.
    parts = [os.sep.join(("", "trainer", part)) for part in ("models", "losses", "metrics")]
    models = [f for f in frames if any(part in f.filename for part in parts)]
    for frame in (own or models)[-1:]:
        source = linecache.getline(frame.filename, frame.lineno or 0).strip()
        text += (
            f"\n  at {os.path.relpath(frame.filename)}:{frame.lineno}, in {frame.name}: {source}"
        )
    if environ.get("PODLIFT_TRACEBACK"):
        return "".join(traceback.format_exception(error)) + text
    more = "PODLIFT_TRACEBACK=1 shows the whole traceback"
    return f"{text}\n  HINT: {hint}; {more}" if hint else f"{text}\n  HINT: {more}"


def _is_library(filename: str) -> bool:
    if filename.startswith((*_LIBRARIES, "<")):
        return True
    return any(name in Path(filename).parts for name in _INSTALLED)
