"""A small run on real digits, with SGD (no amplified rounding) and data that can fail."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "num_steps": 40,
            "global_batch_size": 64,
            "log_every_steps": 10,
            "model": {"target": "trainer.models.mlp:MLP", "hidden_size": 16, "out_size": 10},
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.05},
            "data": {
                "target": "faults:digits",
                "kind": "",
                "rank": 1,
                "at_step": 5,
                "once": placeholder(str),
                "delay": 0.0,
                "load_secs": 0.0,
            },
            "checkpoint": {"every_steps": 10},
        }
    )
