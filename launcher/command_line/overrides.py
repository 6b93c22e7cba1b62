"""Overrides of a config on the command line: `--config.KEY=VALUE`.

A key may contain indices, as in ml_collections: `model.sizes[0]`, `model.layers[0].width`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from trainer.config.keys import flatten
from trainer.errors import UserError


def overridden_keys(argv: Sequence[str]) -> list[str]:
    """The keys of the config that the arguments override."""
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv[1:])
    return [match[1] for match in matches if match]


def check_keys(config: ConfigDict, keys: Sequence[str]) -> None:
    """Raises a UserError for the first key that the config does not have."""
    for key in keys:
        name, bracket, _ = key.partition("[")
        hint = hint_for_key(config, name, "--config.")
        if hint:
            raise UserError(f"--config.{key}: the config has no such key", hint)
        if bracket:
            _check_indices(config, key)


def refuse_lists(config: ConfigDict, keys: Sequence[str]) -> None:
    """Raises a UserError for the first key that holds a list: only its items can be overridden."""
    flat = flatten(config)
    for key in keys:
        if isinstance(flat.get(key), list):
            raise UserError(
                f"--config.{key} is a list, which is overridden item by item",
                f"--config.{key}[0]=VALUE, or make it a tuple in the config file",
            )


def _check_indices(config: ConfigDict, key: str) -> None:
    """Raises a UserError for an index that is wrong, or that names no single item of a list."""
    flag = f"--config.{key}"
    try:
        parts = config_path.split(key)
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"{flag} is not a key with indices", "write --config.sizes[0] or --config.layers[0].n"
        ) from error
    holder: Any = None
    value: Any = config
    where = "config"
    for part in parts:
        holder, is_list = value, isinstance(value, (list, tuple))
        if isinstance(part, str) and isinstance(value, (dict, ConfigDict)) and part in value:
            value, where = value[part], f"{where}.{part}"
        elif type(part) is int and is_list and -len(value) <= part < len(value):
            value, where = value[part], f"{where}[{part}]"
        elif type(part) is int and is_list:
            raise UserError(
                f"{flag}: {where} has {len(value)} item{'s' * (len(value) != 1)}",
                f"the first is --{where}[0]" if value else "set it in the config file",
            )
        elif isinstance(value, (dict, ConfigDict)):
            raise UserError(f"{flag}: {where} has no {part!r}", f"it has {', '.join(value)}")
        elif is_list:
            raise UserError(f"{flag}: {part!r} is not the number of an item of {where}")
        else:
            raise UserError(f"{flag}: {where}={value!r} has no items")
    if isinstance(holder, tuple):
        whole = where.rpartition("[")[0]
        raise UserError(
            f"{flag}: {whole} is a tuple, whose items do not change one by one",
            f'--{whole}="{holder}" sets all of it',
        )


def hint_for_key(config: ConfigDict, key: str, prefix: str = "") -> str:
    """A hint for a key that the config does not have; empty if it is a key or a block of keys."""
    leaves = list(flatten(config))
    blocks = {leaf[:i] for leaf in leaves for i in range(len(leaf)) if leaf[i] == "."}
    if key in blocks or key in leaves:
        return ""
    block, _, name = key.rpartition(".")
    siblings = [leaf for leaf in leaves if leaf.rpartition(".")[0] == block]
    names = [leaf.rpartition(".")[2] for leaf in siblings]
    if "target" in names and not difflib.get_close_matches(name, names, n=1, cutoff=0.6):
        # The key may be a keyword of the target, but overrides only change keys that exist.
        return (
            f"config.{block} has {', '.join(names)}; set other keywords of its target in the "
            "config file"
        )
    near = difflib.get_close_matches(key, leaves, n=1, cutoff=0.6) or [
        leaf for leaf in leaves if leaf.split(".")[-1] == name
    ]
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"its keys there are {', '.join(siblings or leaves)}"


def take_nones(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The keys whose last override is None, and the arguments without those overrides.

    `config_flags` would parse None as a number, or as the text "None". Items of a list keep their
    type.
    """
    is_none: dict[str, bool] = {}
    rest: list[str] = []
    left = [*argv]
    while left:
        argument = left.pop(0)
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match and not match[1].endswith("]"):
            key, value = match.groups()
            if value is None and left[:1] == ["None"]:
                value = left.pop(0)
            is_none[key] = value == "None"
            if is_none[key]:
                continue
        rest.append(argument)
    return [key for key, none in is_none.items() if none], rest
