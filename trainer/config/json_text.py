"""JSON objects in text that anybody may have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_KINDS = {
    list: "a list",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


def parse_object(
    text: str | bytes, parse_constant: Callable[[str], Any] | None = None
) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: as a file holds it.
        parse_constant: called with `NaN`, `Infinity` and `-Infinity`; as in `json.loads`.

    Raises:
        ValueError: the text is anything else; the message says what, in a few words. Raised too for
            what `json` accepts or stumbles over: a key that is there twice, too deep a nesting,
            bytes that are not UTF-8.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError("it is not text in UTF-8") from error
    if not text.strip():
        raise ValueError("it is empty")
    try:
        found = json.loads(text, object_pairs_hook=_object_of, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds {_KINDS.get(type(found), 'null')}, not an object")
    return found


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found
