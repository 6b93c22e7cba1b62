"""Runs a run again: its `config.json` as a config, with overrides.

python -m launcher --config=configs/from_json.py:WORKDIR/config.json --config.seed=1
"""

import builtins
import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(path: str) -> ConfigDict:
    with open(path, encoding="utf-8") as file:
        stored = json.load(file)
    types = stored.pop("__none_types__", {})

    def revive(value: Any, prefix: str) -> Any:
        if isinstance(value, dict):
            return {key: revive(inner, f"{prefix}{key}.") for key, inner in value.items()}
        if isinstance(value, list):  # tuples in the config; lists could not be overridden
            return tuple(revive(inner, prefix) for inner in value)
        if value is None and hasattr(builtins, types.get(prefix[:-1], "")):
            return placeholder(getattr(builtins, types[prefix[:-1]]))
        return value

    return ConfigDict(revive(stored, ""))
