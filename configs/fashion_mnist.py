"""Fashion-MNIST, 60,000 real images of clothes, with ResNet-8.

    python -m launcher --config=configs/fashion_mnist.py

On Debian and Ubuntu, `apt-get install dataset-fashion-mnist` installs the four idx files where this
config expects them. Elsewhere, name their folder with --config.data.directory=DIR.

Takes 110 seconds on two cores, with 1 or 8 devices, and reaches an accuracy of 91 % on the 10,000
held-out images.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "num_epochs": 3,
            "global_batch_size": 128,
            "model": {
                "target": "trainer.models.resnet:ResNet",
                "num_classes": 10,
                "features": 24,
                "stem_strides": 2,
            },
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
            "data": {
                "target": "trainer.data.idx:load",
                "directory": "/usr/share/datasets/fashion-mnist",
                "num_train": placeholder(int),
                "hint": "apt-get install dataset-fashion-mnist, or fetch the four files of "
                "github.com/zalandoresearch/fashion-mnist and set --config.data.directory",
                "augment": {
                    "target": "trainer.data.augment:flip_and_shift",
                    "flip": True,
                    "shift": 0,
                },
            },
            "optimizer": {
                "target": "optax:adamw",
                "learning_rate": {"target": "trainer.schedules:onecycle", "peak_value": 1e-2},
            },
            "checkpoint": {"best_metric": "eval/accuracy", "best_mode": "max"},
        }
    )
