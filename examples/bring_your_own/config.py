from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "num_epochs": 60,
            "global_batch_size": 200,
            "model": {"target": "spirals.model:SpiralNet", "width": 64},
            "loss": {"target": "spirals.loss:hinge", "margin": 1.0},
            "metrics": {"accuracy": {"target": "spirals.loss:accuracy"}},
            "data": {"target": "spirals.data:load", "num_examples": 2000},
            "optimizer": {"target": "optax:adam", "learning_rate": 3e-3},
            "eval": {"every_steps": 80},
            "checkpoint": {"best_metric": "eval/accuracy", "best_mode": "max"},
        }
    )
