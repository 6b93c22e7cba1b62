"""What a run prints."""

from __future__ import annotations

import logging
import queue

LONG = 30.0  # seconds; only a test that fails waits that long


class Warnings(logging.Handler):
    """Collects the warnings that a person sees, line by line; a context manager."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        self._new = queue.Queue()

    def __enter__(self):
        logging.getLogger("podlift").addHandler(self)
        return self

    def __exit__(self, *exception):
        logging.getLogger("podlift").removeHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())
        self._new.put(record.getMessage())

    def wait_for(self, part):
        while part not in (line := self._new.get(timeout=LONG)):
            pass
        return line

    def count(self, part):
        return sum(part in line for line in self.lines)
