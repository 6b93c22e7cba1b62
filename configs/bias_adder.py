"""`BiasAdderWithRunningMean` of Flax's guide on state, as a distributed run.

    python -m launcher --config=configs/bias_adder.py
    python -m launcher --config=configs/bias_adder.py:ones     (the guide's dummy input, 3 x 4 ones)

One parameter and one running mean in `batch_stats`; SGD with a learning rate of 0.02, five epochs
of one batch. The loss is the guide's placeholder, the squared distance to the input, averaged over
the batch. (The guide sums it, which at this learning rate converges for a batch of three only.)

Takes 2 seconds. The loss falls in every epoch, towards the variance of the input.
"""

from ml_collections import ConfigDict


def get_config(data: str = "linear") -> ConfigDict:
    return ConfigDict(
        {
            "num_epochs": 5,
            "global_batch_size": 3 if data == "ones" else 128,
            "model": {
                "target": "trainer.models.bias_adder:BiasAdderWithRunningMean",
                "momentum": 0.9,
            },
            "loss": {"target": "trainer.losses:squared_distance_to_input"},
            "data": {"target": f"trainer.data.tutorial:{data}"},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.02},
        }
    )
