"""Augmentation of image batches, vectorised and seeded per example."""

from __future__ import annotations

import numpy as np

from trainer.data.stream import ExampleRandom, HostBatch


def flip_and_shift(
    batch: HostBatch, random: ExampleRandom, *, flip: bool = True, shift: int = 0
) -> HostBatch:
    """Mirrors half of the images left to right and shifts each by up to `shift` pixels.

    Args:
        batch: `x` of shape (examples, height, width, channels).
        random: the random numbers of the examples.
        flip: whether to mirror.
        shift: the largest shift in pixels along each axis; the image is padded with 0.
    """
    x = batch["x"]
    if flip:
        mirrored = random.uniform(1)[:, 0] < 0.5
        x = np.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    if shift:
        height, width = x.shape[1:3]
        moves = np.floor(random.uniform(2) * (2 * shift + 1)).astype(np.intp)
        padded = np.pad(x, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        rows = moves[:, :1] + np.arange(height)
        columns = moves[:, 1:] + np.arange(width)
        x = padded[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {**batch, "x": x}
