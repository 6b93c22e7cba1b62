"""The digits from a source that is slow on one rank, for the configs of the tests."""

from __future__ import annotations

import time

import jax

from trainer.data.digits import load
from trainer.data.stream import ArraySource


class Slow(ArraySource):
    """A source whose batches take longer on one rank, asleep or computing."""

    def __init__(self, arrays, rank, seconds):
        super().__init__(arrays)
        self._seconds = seconds if jax.process_index() == rank else 0.0

    def __getitem__(self, indices):
        if indices.size > 1:  # a single example is read for its shapes
            time.sleep(self._seconds)
        return super().__getitem__(indices)


def digits(rank=1, seconds=0.05):
    """The digits; each training batch takes `seconds` longer on one rank."""
    sources = load()
    return {"train": Slow(sources["train"], rank, seconds), "eval": sources["eval"]}
