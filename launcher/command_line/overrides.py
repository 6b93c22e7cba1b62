"""Overrides of a config on the command line: `--config.KEY=VALUE`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from trainer.config.keys import flatten
from trainer.errors import UserError


def overridden_keys(argv: Sequence[str]) -> list[str]:
    """The keys of the config that the arguments override."""
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in argv[1:])
    return [match[1] for match in matches if match]


def check_keys(config: ConfigDict, keys: Sequence[str]) -> None:
    """Raises a UserError for the first key that the config does not have."""
    for key in keys:
        hint = hint_for_key(config, key, "--config.")
        if hint:
            raise UserError(f"--config.{key}: the config has no such key", hint)


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

    `config_flags` would parse None as a number, or as the text "None".
    """
    is_none: dict[str, bool] = {}
    rest: list[str] = []
    left = [*argv]
    while left:
        argument = left.pop(0)
        match = re.fullmatch(r"--?(?:no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match:
            key, value = match.groups()
            if value is None and left[:1] == ["None"]:
                value = left.pop(0)
            is_none[key] = value == "None"
            if is_none[key]:
                continue
        rest.append(argument)
    return [key for key, none in is_none.items() if none], rest
