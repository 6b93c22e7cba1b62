"""Images out of nothing: to see a model train, or how fast it does, where the real ones are not."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.stream import HostBatch


class Noise:
    """Random images, a few of them over and over again.

    Image `i` is number `i % pool` of the pool, and its label hangs on that number only, so a model
    can learn them by heart.

    Args:
        length: how many examples there are.
        images: the pool, uint8 `(pool, height, width, 3)`.
        num_classes: labels are below it.
    """

    def __init__(self, length: int, images: np.ndarray, num_classes: int) -> None:
        self._length = length
        self._images = images
        self._labels = np.arange(len(images), dtype=np.int32) % num_classes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        numbers = indices % len(self._images)
        return {"x": self._images[numbers], "y": self._labels[numbers]}


def images(
    seed: int,
    num_train: int = 1_281_167,
    num_eval: int = 50_000,
    image_size: int = 224,
    num_classes: int = 1000,
    pool: int = 64,
) -> dict[str, Any]:
    """Images `x` uint8 (examples, image_size, image_size, 3) and labels `y` int32 (examples,).

    Training and evaluation show the same images: good evaluation means that the model was trained,
    not that it has learned to see.

    Args:
        seed: of the images.
        num_train: training examples; the default is ImageNet's.
        num_eval: examples to evaluate on; the default is ImageNet's.
        image_size: of a side, in pixels.
        num_classes: labels are below it.
        pool: how many images there are in truth; 64 of 224 x 224 pixels take 10 MB.
    """
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (pool, image_size, image_size, 3), np.uint8)
    return {
        "train": Noise(num_train, noise, num_classes),
        "eval": Noise(num_eval, noise, num_classes),
    }
