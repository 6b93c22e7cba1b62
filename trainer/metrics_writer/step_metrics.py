"""The metrics of dispatched steps, read behind the devices, and the time that is not steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from trainer.errors import NonFiniteLoss
from trainer.lift.call import Call
from trainer.lift.in_flight import InFlight
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.train_log import TrainLog


class StepMetrics:
    """Hands the metrics of each call to the log once its devices are done with it.

    Args:
        log: collects them in order.
        goodput: where the time of the run goes.
        read: gives the values of a call as numpy, shape `(steps, metrics)`; waits for the call.
        on_non_finite: called before NonFiniteLoss is raised.
    """

    def __init__(
        self,
        log: TrainLog,
        goodput: Goodput,
        read: Callable[[Any], np.ndarray],
        on_non_finite: Callable[[NonFiniteLoss], None],
    ) -> None:
        self.log = log
        self.goodput = goodput
        self._in_flight = InFlight(read)
        self._on_non_finite = on_non_finite

    def add(self, call: Call, values: Any) -> None:
        """Takes the metrics of a dispatched call; reads those of calls 16 and more before it.

        Args:
            call: which steps.
            values: on the devices, `(metrics,)` or `(steps, metrics)`.

        Raises:
            NonFiniteLoss: as `TrainLog.add`.
        """
        self._log(self._in_flight.push(call.before, values))

    def drain(self) -> None:
        """Reads all calls up to the newest; waits for the devices.

        Raises:
            NonFiniteLoss: as `TrainLog.add`.
        """
        self._log(self._in_flight.drain())

    @contextlib.contextmanager
    def excluding(self, kind: str) -> Generator[None]:
        """Counts the time of a block as `kind`, and not as time of steps."""
        began = time.monotonic()
        with self.goodput.spending(kind):
            yield
        self.log.exclude(time.monotonic() - began)

    def _log(self, finished: Iterable[tuple[int, np.ndarray]]) -> None:
        try:
            for first_step, rows in finished:
                self.log.add(first_step, rows)
        except NonFiniteLoss as error:
            # The later calls may never end: a process that noticed it earlier takes no part.
            self._in_flight.clear()
            self._on_non_finite(error)
            raise
