"""Which rank the others wait for.

In data-parallel training every step takes all ranks equally long, since each waits for the slowest
in the mean of the gradients. What tells them apart is the time that a rank does not wait for the
devices: the wait for its own data, and what its own thread computes to feed them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.console import say
from trainer.lift.lift import Lift
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.tensorboard import TensorBoardWriter

# Told from so many times the median of the others, and from such a part of the step, on.
_NOTABLE_RATIO = 1.5
_NOTABLE_PART = 0.05


@dataclass(frozen=True)
class Slowest:
    """The rank with the most time of its own.

    Attributes:
        rank: which.
        seconds: of its own, a step.
        others: the median of the other ranks.
        cause: what it spends more on than they do.
        is_notable: whether it holds them up.
    """

    rank: int
    seconds: float
    others: float
    cause: str
    is_notable: bool


def find_slowest(data: Sequence[float], host: Sequence[float], step_seconds: float) -> Slowest:
    """The slowest of at least two ranks.

    Args:
        data: seconds a step that each rank waits for its data.
        host: that the thread of its training loop computes.
        step_seconds: wall time of a step.
    """
    own = [wait + work for wait, work in zip(data, host, strict=True)]
    rank = max(range(len(own)), key=own.__getitem__)

    def median_of_others(values: Sequence[float]) -> float:
        return statistics.median([*values[:rank], *values[rank + 1 :]])

    others = median_of_others(own)
    more_wait = data[rank] - median_of_others(data)
    more_work = host[rank] - median_of_others(host)
    return Slowest(
        rank,
        own[rank],
        others,
        "waiting for data" if more_wait >= more_work else "busy on its host",
        own[rank] > _NOTABLE_RATIO * others and own[rank] - others > _NOTABLE_PART * step_seconds,
    )


class Stragglers:
    """Compares the ranks of a run over the steps from one look to the next.

    The first look only begins: until then ranks have compiled and opened files.

    Args:
        lift: what knows the other processes.
        goodput: where this process's time goes.
    """

    def __init__(self, lift: Lift, goodput: Goodput) -> None:
        self._lift = lift
        self._goodput = goodput
        self._began: tuple[int, tuple[float, float, float]] | None = None
        self._told: tuple[int, str] | None = None

    def look(self, step: int, curves: TensorBoardWriter | None) -> None:
        """To be called by all processes at the same steps; they exchange three numbers each.

        Args:
            step: steps taken; the devices have finished them.
            curves: where the numbers go, in the process that writes.
        """
        if self._began is not None and step > self._began[0]:
            first, before = self._began
            spent = (np.array(self._measure()) - before) / (step - first)
            data, host, wall = np.array(self._lift.gather(spent.astype(np.float32))).T.tolist()
            if curves is not None:
                self._tell(step, find_slowest(data, host, max(wall)), curves)
        self._began = step, self._measure()  # the exchange itself is no part of a step

    def _measure(self) -> tuple[float, float, float]:
        """Seconds until now: waiting for data, computing for steps, wall time of both."""
        seconds = self._goodput.seconds()
        return (
            seconds["data"],
            self._goodput.cpu_seconds("step"),
            seconds["data"] + seconds["step"],
        )

    def _tell(self, step: int, slowest: Slowest, curves: TensorBoardWriter) -> None:
        curves.scalars(
            step,
            {
                "straggler/slowest_rank": slowest.rank,
                "straggler/slowest_seconds": slowest.seconds,
                "straggler/median_seconds_of_others": slowest.others,
            },
        )
        found = (slowest.rank, slowest.cause) if slowest.is_notable else None
        if found is not None and found != self._told:  # not at every row
            say(
                f"slowest rank {slowest.rank}: {1000 * slowest.seconds:.3g} ms a step of its own "
                f"against {1000 * slowest.others:.3g} ms (median of the others): {slowest.cause}"
            )
        self._told = found
