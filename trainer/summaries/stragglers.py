"""The straggler: the rank that the others wait for.

In data-parallel training every step takes equally long on all ranks, since each waits for the
slowest in the mean of the gradients. They differ in the time that is not a wait for the devices:
the wait for the rank's own data, and the host time of its training loop.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config.settings import Settings
from trainer.console import say
from trainer.lift.call import Call
from trainer.lift.lift import Lift
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.step_metrics import StepMetrics
from trainer.metrics_writer.tensorboard import TensorBoardWriter

# A rank is notable from this ratio to the median of the others, and this fraction of a step, on.
_NOTABLE_RATIO = 1.5
_NOTABLE_FRACTION = 0.05


@dataclass(frozen=True)
class Slowest:
    """The rank with the most time of its own.

    Attributes:
        rank: its rank.
        seconds: its own time a step.
        others: the median of the other ranks.
        cause: what it spends more time on than the others.
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
        host: seconds of processor time a step of its training loop.
        step_seconds: wall time of a step.
    """
    own = [wait + work for wait, work in zip(data, host, strict=True)]
    rank = max(range(len(own)), key=own.__getitem__)

    def median_of_others(values: Sequence[float]) -> float:
        return statistics.median([*values[:rank], *values[rank + 1 :]])

    others = median_of_others(own)
    is_notable = (
        own[rank] > _NOTABLE_RATIO * others
        and own[rank] - others > _NOTABLE_FRACTION * step_seconds
    )
    more_wait = data[rank] - median_of_others(data)
    more_work = host[rank] - median_of_others(host)
    return Slowest(
        rank,
        own[rank],
        others,
        "waiting for data" if more_wait >= more_work else "busy on its host",
        is_notable,
    )


class Stragglers:
    """Compares the ranks of a job over the steps of each row (`config.summaries.stragglers`).

    The first row only starts the clock: before it, ranks compile and open files.

    Args:
        lift: the processes.
        metrics: whose time is compared.
        run_log: whose TensorBoard the numbers go to.
        every_steps: steps a row.
    """

    def __init__(
        self, lift: Lift, metrics: StepMetrics, run_log: RunLog, every_steps: int | None
    ) -> None:
        self._lift = lift
        self._metrics = metrics
        self._run_log = run_log
        self._every_steps = every_steps
        self._began: tuple[int, tuple[float, float, float]] | None = None
        self._reported: tuple[int, str] | None = None

    @classmethod
    def of(
        cls, settings: Settings, lift: Lift, metrics: StepMetrics, run_log: RunLog
    ) -> Stragglers | None:
        """What a config asks for; None where it asks for none, or there is one process only."""
        if not settings.stragglers or lift.num_processes == 1:
            return None
        return cls(lift, metrics, run_log, settings.log_every_steps)

    def due(self, call: Call) -> bool:
        """After each row of metrics."""
        return call.is_last or call.reaches(self._every_steps)

    def run(self, call: Call, state: Any) -> None:
        """Gathers three numbers of each rank; the devices have finished the steps of the row."""
        with self._metrics.excluding("summaries"):
            if self._began is not None and call.step > self._began[0]:
                first, before = self._began
                spent = (np.array(self._measure()) - before) / (call.step - first)
                gathered = np.array(self._lift.gather(spent.astype(np.float32)))
                data, host, wall = gathered.T.tolist()
                if self._run_log.tensorboard is not None:
                    slowest = find_slowest(data, host, max(wall))
                    self._report(call.step, slowest, self._run_log.tensorboard)
            self._began = (
                call.step,
                self._measure(),
            )  # after the gather, which is not part of a step

    def _measure(self) -> tuple[float, float, float]:
        """Seconds so far: the wait for data, processor time of steps, wall time of both."""
        goodput = self._metrics.goodput
        seconds = goodput.seconds()
        return (
            seconds["data"],
            goodput.cpu_seconds("step"),
            seconds["data"] + seconds["step"],
        )

    def _report(self, step: int, slowest: Slowest, tensorboard: TensorBoardWriter) -> None:
        tensorboard.scalars(
            step,
            {
                "straggler/slowest_rank": slowest.rank,
                "straggler/slowest_seconds": slowest.seconds,
                "straggler/median_seconds_of_others": slowest.others,
            },
        )
        found = (slowest.rank, slowest.cause) if slowest.is_notable else None
        if found is not None and found != self._reported:  # once, not at every row
            say(
                f"slowest rank {slowest.rank}: {1000 * slowest.seconds:.3g} ms a step of its own "
                f"against {1000 * slowest.others:.3g} ms (median of the others): {slowest.cause}"
            )
        self._reported = found
