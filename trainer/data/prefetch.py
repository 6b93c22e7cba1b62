"""Prefetching: a thread prepares batches and moves them to the devices ahead of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def depth_for(asked: int | None, platform: str) -> int:
    """How many batches to prepare ahead.

    With an accelerator, a thread hides the time of the input. On CPU it competes with the step.

    Args:
        asked: `config.data.prefetch`; None chooses by platform.
        platform: "cpu", "gpu" or "tpu".
    """
    if asked is not None:
        return asked
    return 0 if platform == "cpu" else 2


def prefetch(make: Callable[[Any], Any], keys: Iterable[Any], depth: int) -> Generator[Any]:
    """Yields `make(key)` for each key, in order, computed up to `depth` ahead in a thread.

    Exceptions of `make` are raised here. A StopIteration among them becomes a RuntimeError, as in
    any generator; `map` would take it for the end of the keys. Closing the iterator stops the
    thread.

    Args:
        make: called in the thread, one key at a time.
        keys: the arguments of `make`.
        depth: how many results to keep ready; 0 computes each on demand, without a thread.
    """
    if depth == 0:
        for key in keys:
            yield make(key)
        return
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for key in keys:
                if stop.is_set():
                    return
                put((True, make(key)))
            put((False, None))
        except BaseException as error:  # raised by the consumer
            put((False, error))

    threading.Thread(target=work, name="podlift-prefetch", daemon=True).start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        stop.set()
