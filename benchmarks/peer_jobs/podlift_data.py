"""The examples of `benchmarks/peers.py` for podlift; a process pauses when it reads a batch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from pauses import Pauses

from trainer.data.stream import ArraySource, HostBatch


class Pausing:
    """A source that pauses before some batches, at steps where the loop has drained."""

    def __init__(self, source: ArraySource, pauses: Pauses) -> None:
        self._source, self._pauses, self._step = source, pauses, 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, indices: np.ndarray) -> HostBatch:
        if indices.size > 1:  # a single example only shows the shapes
            if self._pauses.is_due(self._step):
                self._pauses.wait()
            self._step += 1
        return self._source[indices]


def load(path: str, address: str, segment: int) -> dict[str, Any]:
    with np.load(path) as arrays:
        source = ArraySource({"x": arrays["x"], "y": arrays["y"]})
    return {"train": Pausing(source, Pauses(address, segment, jax.process_index()))}
