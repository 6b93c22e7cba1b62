"""The live view of a run on a terminal: a progress bar and three lines below the log.

A thread draws it four times a second from attributes that the run assigns, so a step costs one
assignment. It is shown on terminals only.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainer.console import duration, escape, print_above
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.messages import describe_chips, describe_rate, describe_shares

_PER_SECOND = 4


class LiveView:
    """The live view. It shows its attributes, which the run replaces and never mutates.

    Args:
        step: steps taken so far.
        stop: the step at which the run stops.
        num_devices: of the run.
        newest: gives the metrics of the newest finished step, by name.
        goodput: where the time goes.

    Attributes:
        step: steps dispatched so far.
        speed: the tags of the last row, with speed and memory.
        evaluation: the metrics of the last evaluation, by tag.
        saved: the step of the last checkpoint, and its time by `time.monotonic`.
    """

    def __init__(
        self,
        step: int,
        stop: int,
        num_devices: int,
        newest: Callable[[], Mapping[str, float]],
        goodput: Goodput,
    ) -> None:
        self.step = self._first = step
        self.speed: Mapping[str, float] = {}
        self.evaluation: Mapping[str, float] = {}
        self.saved: tuple[int, float] | None = None
        self._stop = stop
        self._num_devices = num_devices
        self._newest = newest
        self._goodput = goodput
        self._began = time.monotonic()
        self._live: Any = None

    def start(self) -> None:
        """Shows the view, where stdout is a terminal."""
        if not sys.stdout.isatty():
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(file=sys.stdout)
        # The output of user code is printed above the view too, if it goes to the same terminal.
        both = _is_one_terminal(sys.stdout, sys.stderr)
        self._live = Live(
            console=console,
            get_renderable=self.draw,
            refresh_per_second=_PER_SECOND,
            transient=True,
            redirect_stderr=both,
        )
        self._live.start(refresh=True)
        print_above(console, warnings=both)

    def close(self) -> None:
        """Removes the view."""
        if self._live is not None:
            live, self._live = self._live, None
            print_above(None)
            with contextlib.suppress(OSError):  # the terminal is gone
                live.stop()

    def draw(self) -> Any:
        """The current view."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        top = Table.grid(padding=(0, 2))
        top.add_row(ProgressBar(total=self._stop, completed=self.step, width=40), self._progress())
        lines = [self._values(), self._speed(), self._time()]
        return Group(
            top, *(Text(escape(line), no_wrap=True, overflow="ellipsis") for line in lines)
        )

    def _progress(self) -> str:
        shown = f"{self.step:,}/{self._stop:,}  {self.step / self._stop:.0%}"
        taken = self.step - self._first
        if not taken:
            return shown
        seconds = (time.monotonic() - self._began) / taken  # with evaluations and saves
        return f"{shown}  eta {duration((self._stop - self.step) * seconds)}"

    def _values(self) -> str:
        values = dict(self._newest())
        values.pop("learning_rate", None)
        values.pop("grad_norm", None)
        names = sorted(values, key=lambda name: (name != "loss", name))
        shown = [f"{name} {values[name]:.4g}" for name in names]
        shown += [f"{tag} {value:.4g}" for tag, value in self.evaluation.items()]
        return "  ".join(shown)

    def _speed(self) -> str:
        if not self.speed:
            return ""
        shown = [describe_rate(self.speed, self._num_devices)]
        shown += [f"{1000 * self.speed['train/step_seconds']:.3g} ms/step"]
        return "  ".join(shown + describe_chips(self.speed))

    def _time(self) -> str:
        shown = f"time: {describe_shares(self._goodput)}"
        if self.saved is None:
            return shown
        step, when = self.saved
        return f"checkpoint {step:,}, {duration(time.monotonic() - when)} ago  {shown}"


def _is_one_terminal(a: Any, b: Any) -> bool:
    """Whether two streams are the same terminal."""
    try:
        return a.isatty() and b.isatty() and os.path.sameopenfile(a.fileno(), b.fileno())
    except (OSError, ValueError, AttributeError):  # closed, or not a stream
        return False
