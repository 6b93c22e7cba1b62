"""The config of an earlier run, read from its `config.json`, to repeat it with overrides.

python -m launcher --config=configs/from_json.py:WORKDIR/config.json --config.seed=1
"""

from ml_collections import ConfigDict

from trainer.config.config_json import config_from_json


def get_config(path: str) -> ConfigDict:
    with open(path, encoding="utf-8") as file:
        return config_from_json(file.read())
