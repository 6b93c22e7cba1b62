"""ImageNet with ResNet-50, in bfloat16: 100 epochs at a batch of 1024.

    python -m launcher --config=configs/imagenet_resnet50.py
    python -m launcher --config=configs/imagenet_resnet50.py:folder --config.data.directory=DIR
    python -m launcher --config=configs/imagenet_resnet50.py:array_record

The first command uses random images, which need no files, to show that training works and how fast
it is. The second reads DIR/train/CLASS/*.JPEG and DIR/val/CLASS/*.JPEG, the third ArrayRecord
files; docs/imagenet.md says how to get them.

The full run has not been made. The config follows Flax's ImageNet example, whose README reports a
top-1 accuracy of 76.4 % to 76.7 % on the held-out images after the same 125,100 steps;
docs/imagenet.md lists the differences.

With these settings it is small enough for two cores, where it takes 40 s:

    --config.model.stage_blocks="(1, 1, 1, 1)" --config.model.features=8 --config.data.image_size=32
    --config.global_batch_size=64 --config.num_steps=30 --config.data.num_eval=64 --fake_devices=8
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(data: str = "synthetic") -> ConfigDict:
    config = ConfigDict(
        {
            "num_epochs": 100,
            "global_batch_size": 1024,
            "model": {
                "target": "trainer.models.resnet50:ResNet50",
                "num_classes": 1000,
                "features": 64,
                "stage_blocks": (3, 4, 6, 3),
                "dtype": "bfloat16",
            },
            "loss": {
                "target": "trainer.losses:softmax_cross_entropy",
                "label_smoothing": 0.1,
            },
            "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
            "optimizer": {
                "target": "trainer.optimizers:sgd",
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 1e-4,
            },
            "checkpoint": {"best_metric": "eval/accuracy", "best_mode": "max"},
        }
    )
    config.optimizer.learning_rate = {
        "target": "trainer.schedules:warmup_cosine",
        # 0.1 per 256 examples of a batch; a reference, so that it follows overrides of the size.
        "peak_value": config.get_ref("global_batch_size").to_float() * 0.1 / 256,
        "warmup_fraction": 0.05,  # 5 of the 100 epochs
    }
    if data == "synthetic":
        config.data = {
            "target": "trainer.data.synthetic:images",
            "num_train": 1_281_167,
            "num_eval": 50_000,
            "image_size": 224,
            "num_classes": config.model.get_ref("num_classes"),
        }
    elif data == "folder":
        config.data = {
            "target": "trainer.data.images:folder",
            "directory": "/data/imagenet",
            "image_size": 224,
            "num_classes": config.model.get_ref("num_classes"),
            "num_threads": placeholder(int),
        }
    elif data == "array_record":
        config.data = {
            "target": "trainer.data.grain_source:array_records",
            "train": "/data/imagenet/train-*.array_record",
            "eval": "/data/imagenet/val-*.array_record",
            "parse": {"target": "trainer.data.images:Decode", "image_size": 224},
            "num_threads": placeholder(int),
        }
    else:
        raise ValueError(f"there is no data {data!r}; there are synthetic, folder and array_record")
    return config
