"""Random images, to test or time a model without the real data."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.data.stream import HostBatch


class Noise:
    """A pool of random images, repeated.

    Example `i` is image `i % pool`, and its label depends on that number only, so a model can
    memorise them.

    Args:
        length: the number of examples.
        images: the pool, uint8 `(pool, height, width, 3)`.
        num_classes: labels are less than this.
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

    Training and evaluation use the same images, so a good evaluation shows that training works, and
    nothing about generalisation.

    Args:
        seed: the seed of the images.
        num_train: training examples; the default is that of ImageNet.
        num_eval: examples to evaluate on; the default is that of ImageNet.
        image_size: the side of an image, in pixels.
        num_classes: labels are less than this.
        pool: the number of different images; 64 of 224 x 224 pixels take 10 MB.
    """
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256, (pool, image_size, image_size, 3), np.uint8)
    return {
        "train": Noise(num_train, noise, num_classes),
        "eval": Noise(num_eval, noise, num_classes),
    }
