"""The job of `benchmarks/recovery.py`, which sets the values that are 0 or empty here."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "num_steps": 0,
            "global_batch_size": 64,
            "log_every_steps": 10,
            "model": {
                "target": "trainer.models.mlp:PlainMLP",
                "hidden_sizes": (128, 128),
                "out_size": 10,
            },
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.05, "momentum": 0.9},
            "data": {
                "target": "podlift_data:load",
                "examples": 1437,
                "kind": "",
                "mark": "",
                "after": 0,
                "delay": 0.0,
            },
            "checkpoint": {"every_steps": 0},
        }
    )
