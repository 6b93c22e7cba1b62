"""Runs a run again: its `config.json` as a config, with overrides.

python -m launcher --config=configs/from_json.py:WORKDIR/config.json --config.seed=1
"""

from ml_collections import ConfigDict

from trainer.config.config_json import config_from_json


def get_config(path: str) -> ConfigDict:
    with open(path, encoding="utf-8") as file:
        return config_from_json(file.read())
