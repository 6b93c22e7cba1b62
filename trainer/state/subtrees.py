"""Subtrees of a model by path, such as "encoder/Dense_0": complete components of leaf names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def is_within(name: str, subtree: str) -> bool:
    """Whether a leaf belongs to a subtree; the path "" names the entire tree."""
    return not subtree or name == subtree or name.startswith(f"{subtree}/")


def hint_for(path: str, names: Iterable[str]) -> str:
    """A hint for a path that matches no leaf: similar paths, or the outermost ones.

    Args:
        path: the path that matches nothing.
        names: the names of all leaves.
    """
    known: dict[str, None] = {}  # an ordered set
    for name in names:
        components = name.split("/")
        known |= dict.fromkeys(
            "/".join(components[:count]) for count in range(1, len(components) + 1)
        )
    near = difflib.get_close_matches(path, known, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    outermost = [name for name in known if "/" not in name]
    more = ", ..." if outermost[8:] else ""
    return f"there are {', '.join(outermost[:8])}{more}"
