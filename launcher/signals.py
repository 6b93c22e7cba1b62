"""Being asked to stop: SIGTERM or Ctrl-C ask for a save, a second Ctrl-C does not wait."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


class StopRequest:
    """Remembers that the process was asked to stop. Call it to ask whether it was."""

    def __init__(self) -> None:
        self._requested = False

    def __call__(self, step: int, phase: str) -> bool:
        """Whether the process was asked to stop."""
        return self._requested

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT for the rest of the process."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._requested:
                os._exit(128 + signal.SIGINT)
            # os.write: the handler may have interrupted a print.
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                b"\nstopping after this step and saving; Ctrl-C again to stop at once\n",
            )
        self._requested = True
