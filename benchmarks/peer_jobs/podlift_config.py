"""The jobs of `benchmarks/peers.py`, by name; the command line sets the rest.

`mlp-local` is `mlp` with BatchNorm over each shard alone, as under torch's DDP.
"""

from ml_collections import ConfigDict

MODELS = {
    "mlp": {"target": "trainer.models.mlp:MLP", "hidden_size": 512, "out_size": 10},
    "wide": {"target": "trainer.models.mlp:MLP", "hidden_size": 2048, "out_size": 10},
    "resnet": {"target": "trainer.models.resnet:ResNet", "num_classes": 10},
}
BATCHES = {"mlp": 1024, "wide": 256, "resnet": 256}


def get_config(name: str = "mlp") -> ConfigDict:
    name, _, local = name.partition("-")
    axis_name = None if local else "batch"
    return ConfigDict(
        {
            "num_steps": 1,
            "global_batch_size": BATCHES[name],
            "model": {**MODELS[name], "axis_name": axis_name},
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.05, "momentum": 0.9},
            "data": {"target": "podlift_data:load", "path": "", "address": "", "segment": 10**9},
            "checkpoint": {"every_steps": 10**9, "fast_every_secs": 0.0},
        }
    )
