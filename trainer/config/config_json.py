"""Conversion between a config and JSON, which also records the types of None fields."""

from __future__ import annotations

import builtins
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from trainer.config.json_text import parse_object
from trainer.config.keys import flatten
from trainer.errors import UserError

NONE_TYPES = "__none_types__"
_MAX_DEPTH = 50


def config_to_json(config: ConfigDict) -> str:
    """Converts a config to JSON, with the types of None fields under the key `NONE_TYPES`.

    Raises:
        UserError: a value cannot be written as JSON.
    """

    def none_types(block: ConfigDict, prefix: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for key in block:
            if isinstance(block[key], ConfigDict):
                found |= none_types(block[key], f"{prefix}{key}.")
            elif block[key] is None:
                found[f"{prefix}{key}"] = block.get_type(key).__name__
        return found

    plain = plain_data(config.to_dict())
    for key, value in flatten(plain).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"config.{key} holds a {type(value).__name__}; configs hold data only",
                'name code by its import path: target="package.module:attribute"',
            ) from error
    return json.dumps({**plain, NONE_TYPES: none_types(config, "")}, indent=2) + "\n"


def plain_data(value: Any) -> Any:
    """A value with dicts in place of `ConfigDict`, which `to_dict` leaves in lists."""
    if isinstance(value, (dict, ConfigDict)):
        return {key: plain_data(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        items = [plain_data(inner) for inner in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def config_from_json(text: str | bytes) -> ConfigDict:
    """The inverse of `config_to_json`, except that lists come back as tuples.

    Raises:
        ValueError: the text is no such config; the message says why, in a few words.
    """
    stored = parse_object(text)
    types = stored.pop(NONE_TYPES, {})
    if not isinstance(types, dict):
        raise ValueError(f"{NONE_TYPES} is not an object")

    def revive(value: Any, prefix: str, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(value, dict):
            return {k: revive(inner, f"{prefix}{k}.", depth + 1) for k, inner in value.items()}
        if isinstance(value, list):
            return tuple(revive(inner, prefix, depth + 1) for inner in value)
        if value is None:
            kind = getattr(builtins, str(types.get(prefix[:-1], "")), None)
            return placeholder(kind) if isinstance(kind, type) else value
        return value

    try:
        return ConfigDict(revive(stored, ""))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it is no config: {error}") from error
