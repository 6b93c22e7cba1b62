"""Image augmentation, seeded per example and vectorised."""

from __future__ import annotations

import numpy as np

from trainer.data.stream import ExampleRandom, HostBatch


def flip_and_shift(
    batch: HostBatch, random: ExampleRandom, *, flip: bool = True, shift: int = 0
) -> HostBatch:
    """Mirrors half of the images left to right and moves each by up to `shift` pixels.

    Args:
        batch: `x` of shape (examples, height, width, channels).
        random: the examples' random numbers.
        flip: whether to mirror.
        shift: the largest move in pixels along each axis; what comes in at the edge is 0.
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
