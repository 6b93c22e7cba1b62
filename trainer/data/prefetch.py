"""Batches made and moved to the devices ahead of time, by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any


def depth_for(asked: int | None, platform: str) -> int:
    """How many batches to make ahead, where that was left open.

    A thread hides input behind an accelerator; on CPU it competes with the step.
    """
    if asked is not None:
        return asked
    return 0 if platform == "cpu" else 2


def prefetch(make: Callable[[Any], Any], keys: Iterable[Any], depth: int) -> Generator[Any]:
    """Yields `make(key)` for each key, in order, made up to `depth` ahead in a thread.

    What `make` raises is raised here. Closing the iterator stops the thread.

    Args:
        make: called in the thread, one key at a time.
        keys: what to make.
        depth: how many to hold ready; 0 makes each when it is asked for, without a thread.
    """
    if depth == 0:
        yield from map(make, keys)
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
        except BaseException as error:  # handed to the consumer, whatever it is
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
