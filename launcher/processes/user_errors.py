"""What is told of an error in a user's code: one line of it, and where; no traceback."""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
from collections.abc import Mapping
from pathlib import Path

_LAUNCHER = Path(__file__).parents[1]
_PACKAGE_FOLDERS = [str(_LAUNCHER), str(_LAUNCHER.parent / "trainer")]


def describe(what: str, error: Exception, environ: Mapping[str, str], hint: str = "") -> str:
    """What went wrong in a user's code, and in which of its lines.

    Args:
        what: could not be done.
        error: as it was raised.
        environ: where PODLIFT_TRACEBACK asks for all of it.
        hint: what to do about it; how to see more where there is none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    libraries = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), *_PACKAGE_FOLDERS]
    own = [f for f in frames if not f.filename.startswith((*libraries, "<"))]
    lines = str(error).strip().splitlines() or [""]
    told = f"error: {what}: {type(error).__name__}: {lines[0]}"
    # With nothing of the user's on the way, the last line of podlift's own models is the nearest.
    parts = [os.sep.join(("", "trainer", part)) for part in ("models", "losses", "metrics")]
    models = [f for f in frames if any(part in f.filename for part in parts)]
    for frame in (own or models)[-1:]:
        source = linecache.getline(frame.filename, frame.lineno or 0).strip()
        told += (
            f"\n  at {os.path.relpath(frame.filename)}:{frame.lineno}, in {frame.name}: {source}"
        )
    if environ.get("PODLIFT_TRACEBACK"):
        return "".join(traceback.format_exception(error)) + told
    more = "PODLIFT_TRACEBACK=1 shows the whole traceback"
    return f"{told}\n  HINT: {hint}; {more}" if hint else f"{told}\n  HINT: {more}"
