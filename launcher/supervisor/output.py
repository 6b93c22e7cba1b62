"""The output of a worker, as lines."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO

from launcher.processes.event_loop import EventLoop

# A longer line is passed on in parts.
_MAX_LINE_BYTES = 1 << 20
# Between two looks at whether output is wanted again.
_PAUSE_SECS = 0.05


class Lines:
    r"""Reads whole lines from a pipe, until its end.

    A progress bar writes `\r` and its new state over the old one: of such a line the last state
    counts, as on a terminal, and before its end one state in `update_secs`.

    Args:
        loop: calls back.
        pipe: what to read.
        on_line: gets each line; bytes that are not UTF-8 become surrogates (PEP 383).
        is_full: whether to leave what comes in the pipe, where it ends up blocking the worker.
        update_secs: seconds between two states of an unfinished line.
    """

    def __init__(
        self,
        loop: EventLoop,
        pipe: IO[bytes],
        on_line: Callable[[str], None],
        is_full: Callable[[], bool] = lambda: False,
        update_secs: float = 10.0,
    ) -> None:
        self._loop = loop
        self._pipe = pipe
        self._on_line = on_line
        self._is_full = is_full
        self._update_secs = update_secs
        self._last_update = loop.time()
        self._rest = b""
        os.set_blocking(pipe.fileno(), False)
        loop.add_reader(pipe, self._read)

    def _read(self) -> None:
        if self._is_full():
            self._loop.remove_reader(self._pipe)
            self._loop.call_later(_PAUSE_SECS, self._resume)
            return
        try:
            data = os.read(self._pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._pass_on(_last_state(line))
        if b"\r" in self._rest:
            self._rest = _last_state(self._rest) + b"\r" * self._rest.endswith(b"\r")
            if self._loop.time() - self._last_update >= self._update_secs:
                self._last_update = self._loop.time()
                self._pass_on(self._rest.rstrip(b"\r"))
        if (not data and self._rest) or len(self._rest) > _MAX_LINE_BYTES:
            rest, self._rest = self._rest, b""
            self._pass_on(_last_state(rest))
        if not data:
            self._loop.remove_reader(self._pipe)
            self._pipe.close()

    def _resume(self) -> None:
        if not self._pipe.closed:
            self._loop.add_reader(self._pipe, self._read)

    def _pass_on(self, line: bytes) -> None:
        self._on_line(line.decode(errors="surrogateescape"))


def _last_state(line: bytes) -> bytes:
    return line.rstrip(b"\r").rpartition(b"\r")[2]
