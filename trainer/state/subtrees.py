"""Parts of a model by their path, such as "encoder/Dense_0": a whole name, or whole parts of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def is_within(name: str, part: str) -> bool:
    """Whether a leaf belongs to a part of the model; "" is the whole of it."""
    return not part or name == part or name.startswith(f"{part}/")


def hint_for(part: str, names: Iterable[str]) -> str:
    """What a part that is not there may have been meant to be.

    Args:
        part: as it was written.
        names: of the leaves that there are.
    """
    parts: dict[str, None] = {}  # a set in order
    for name in names:
        pieces = name.split("/")
        parts |= dict.fromkeys("/".join(pieces[:count]) for count in range(1, len(pieces) + 1))
    near = difflib.get_close_matches(part, parts, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    outermost = [name for name in parts if "/" not in name]
    more = ", ..." if outermost[8:] else ""
    return f"there are {', '.join(outermost[:8])}{more}"
