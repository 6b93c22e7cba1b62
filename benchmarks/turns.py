"""Contestants that take turns in one process, so that drift of the machine affects all equally."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

Contestant = Callable[[Callable[[], bool]], Any]


class Turns:
    """Runs each contestant in a thread of its own, one segment at a time, round after round.

    A contestant is a function of one argument, `turn`, which it calls at the end of each segment,
    once all of its work is done. `turn` returns False to continue and True to end.
    """

    def __init__(self, rounds: int, warmup: int = 2) -> None:
        self._rounds = rounds + warmup
        self._warmup = warmup
        self.seconds: dict[str, list[float]] = {}

    def run(self, contestants: dict[str, Contestant]) -> None:
        """Times all contestants; `seconds[name]` holds one time per round, without the warm-up."""
        failures: list[BaseException] = []
        go = {name: threading.Semaphore(0) for name in contestants}
        done = threading.Semaphore(0)
        ended = dict.fromkeys(contestants, False)

        def compete(name: str, contestant: Contestant) -> None:
            def turn() -> bool:
                done.release()
                go[name].acquire()
                return ended[name]

            go[name].acquire()
            try:
                contestant(turn)
            except BaseException as error:
                failures.append(error)
            done.release()

        threads = [
            threading.Thread(target=compete, args=item, daemon=True) for item in contestants.items()
        ]
        for thread in threads:
            thread.start()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(self._rounds):
            for name in contestants:
                began = time.perf_counter()
                go[name].release()
                done.acquire()
                times[name].append(time.perf_counter() - began)
                if failures:
                    raise failures[0]
        for name in contestants:
            ended[name] = True
            go[name].release()
        for thread in threads:
            thread.join(timeout=30)
        self.seconds = {name: values[self._warmup :] for name, values in times.items()}

    def ratio(self, name: str, of: str) -> float:
        """The median over the rounds of one contestant's time divided by another's."""
        pairs = zip(self.seconds[name], self.seconds[of], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def median(self, name: str) -> float:
        """The median time of a segment, in seconds."""
        return statistics.median(self.seconds[name])


def take_steps(
    step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batches: Iterable[Any]
) -> tuple[Any, Any]:
    """Takes one step per batch and waits for the last; returns its state and metrics."""
    import jax  # a benchmark asks for its devices first

    from trainer.lift.in_flight import MAX_IN_FLIGHT

    metrics = None
    window: deque[Any] = deque()
    for batch in batches:
        state, metrics = step(state, batch)
        window.append(metrics)
        if len(window) > MAX_IN_FLIGHT:
            window.popleft().block_until_ready()
    jax.block_until_ready(state)
    return state, metrics
