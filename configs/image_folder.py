"""Small images from a folder a class, as CIFAR-10 in PNG files, with ResNet-20.

    python -m launcher --config=configs/image_folder.py --config.data.directory=DIR

DIR holds train/CLASS/*.png and test/CLASS/*.png (or .jpg); for another number of classes than ten,
add --config.model.num_classes=N, and for another folder than test --config.data.eval=val. Images of
any size are brought to 32 x 32 pixels. In training each is mirrored half of the time and moved by
up to 4 pixels along each axis (He et al., arXiv:1512.03385, section 4.2).

One epoch of Fashion-MNIST, written as PNG files, takes 7 minutes of processor time and reaches 84 %
of the 10,000 held-out images. The 30 epochs have not been run here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict(
        {
            "num_epochs": 30,
            "global_batch_size": 128,
            "model": {
                "target": "trainer.models.resnet:ResNet",
                "num_classes": 10,
                "features": 16,
                "stage_blocks": (3, 3, 3),
            },
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
            "optimizer": {
                "target": "trainer.optimizers:sgd",
                "learning_rate": {"target": "trainer.schedules:warmup_cosine", "peak_value": 0.1},
                "weight_decay": 1e-4,
            },
            "checkpoint": {"best_metric": "eval/accuracy", "best_mode": "max"},
        }
    )
    config.data = {
        "target": "trainer.data.images:folder",
        "directory": "/data/cifar10",
        "train": "train",
        "eval": "test",
        "image_size": 32,
        "num_classes": config.model.get_ref("num_classes"),
        # The whole image, as it is: what is cut out of photographs is too much of small images.
        "min_area": 1.0,
        "max_aspect": 1.0,
        "central": 1.0,
        "num_threads": placeholder(int),
        "augment": {
            "target": "trainer.data.augment:flip_and_shift",
            "flip": False,  # where an image is decoded it is mirrored already
            "shift": 4,
        },
    }
    return config
