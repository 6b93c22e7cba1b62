"""Random examples for podlift; rank 1 fails when it reads a batch."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
from fault import strike

from trainer.data.stream import ArraySource, HostBatch


class Failing:
    """A source that takes `delay` seconds per batch, and fails on rank 1 after `after` batches."""

    def __init__(self, source: ArraySource, kind: str, mark: str, after: int, delay: float) -> None:
        self._source = source
        self._kind, self._mark, self._after, self._delay = kind, mark, after, delay
        self._batches = 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: np.ndarray) -> HostBatch:
        if indices.size > 1:  # a single example only shows the shapes
            time.sleep(self._delay)
            if self._batches == self._after and jax.process_index() == 1:
                strike(self._kind, self._mark)
            self._batches += 1
        return self._source[indices]


def load(examples: int, kind: str, mark: str, after: int, delay: float) -> dict[str, Any]:
    random = np.random.default_rng(0)
    x = random.normal(size=(examples, 64)).astype(np.float32)
    y = random.integers(0, 10, examples).astype(np.int32)
    return {"train": Failing(ArraySource({"x": x, "y": y}), kind, mark, after, delay)}
