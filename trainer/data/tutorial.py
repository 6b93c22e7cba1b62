"""The synthetic data of the tutorial configs."""

from __future__ import annotations

from typing import Any

import numpy as np


def linear(
    seed: int, num_examples: int = 128, num_features: int = 5, noise: float = 0.1
) -> dict[str, Any]:
    """`Y = X W + b` with X ~ U(0, 1), where X is observed with noise.

    Args:
        seed: the seed of X, W, b and the noise.
        num_examples: rows of X and Y.
        num_features: columns of X; Y has one column.
        noise: standard deviation of the normal noise, added to X after Y is computed.
    """
    random = np.random.default_rng(seed)
    x = random.uniform(size=(num_examples, num_features))
    weights = random.normal(size=(num_features, 1)) / np.sqrt(num_features)
    y = x @ weights + random.normal(size=(1,))
    x = x + noise * random.normal(size=x.shape)
    return {"train": {"x": x.astype(np.float32), "y": y.astype(np.float32)}}


def ones(num_examples: int = 3, num_features: int = 4) -> dict[str, Any]:
    """The `dummy_input` of Flax's guide: all ones."""
    return {"train": {"x": np.ones((num_examples, num_features), np.float32)}}
