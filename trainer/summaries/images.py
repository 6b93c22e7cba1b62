"""Arrays as images for TensorBoard, uint8 `(height, width, channels)`."""

from __future__ import annotations

import numpy as np


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images of any dtype as uint8: floats from 0 to 1 times 255, others from least to most."""
    if images.dtype == np.uint8:
        return images
    values = np.nan_to_num(images.astype(np.float64))
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / ((high - low) or 1.0)
    return np.asarray(np.round(255 * values), np.uint8)


def tile(images: np.ndarray, side: int = 64, gap: int = 2) -> np.ndarray:
    """One page of images in rows and columns, on white.

    Args:
        images: uint8, `(count, height, width, channels)`.
        side: smaller images are enlarged to about this many pixels.
        gap: pixels between them.
    """
    factor = max(1, side // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    lines = -(-count // columns)
    shape = (lines * (height + gap) - gap, columns * (width + gap) - gap, channels)
    page = np.full(shape, 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def heat(values: np.ndarray, side: int = 480) -> np.ndarray:
    """A matrix of values from 0 to 1 as cells from white to dark blue, about `side` pixels."""
    factor = max(1, side // max(values.shape))
    shade = values.repeat(factor, axis=0).repeat(factor, axis=1)[..., None]
    white, blue = np.array([255.0, 255.0, 255.0]), np.array([8.0, 48.0, 107.0])
    return np.asarray(np.round(white + shade * (blue - white)), np.uint8)
