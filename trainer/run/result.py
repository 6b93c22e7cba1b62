"""What `trainer.train` returns."""

from __future__ import annotations

from typing import NamedTuple

from trainer.state.train_state import TrainState


class Result(NamedTuple):
    """The end of a run.

    Attributes:
        state: the final state, on the devices.
        metrics: the last value of every tag that was reported, as `{"train/loss": ...}`.
    """

    state: TrainState
    metrics: dict[str, float]
