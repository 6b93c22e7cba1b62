"""One connection between two launchers."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

from launcher.processes.event_loop import EventLoop

_LONGEST_LINE = 1 << 20


class Connection:
    """One connection: lines of JSON in both directions, and a beat to show that it is alive."""

    def __init__(
        self,
        loop: EventLoop,
        connection: socket.socket,
        on_message: Callable[[dict[str, Any]], None],
        on_loss: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._on_message = on_message
        self._on_loss = on_loss
        self._received = b""
        self._unsent = b""
        self._is_open = True
        self.heard = loop.time()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add_reader(connection, self._read)

    def send(self, kind: str, **values: Any) -> None:
        """Sends one message. What the network does not take at once follows with the next."""
        if not self._is_open:
            return
        self._unsent += json.dumps({"kind": kind, **values}).encode() + b"\n"
        try:
            self._unsent = self._unsent[self._connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error.strerror or "the connection broke")

    def close(self) -> None:
        """Ends it, after a last try to send what is left."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._connection)
        with contextlib.suppress(OSError):
            if self._unsent:
                self._connection.settimeout(1.0)
                self._connection.sendall(self._unsent)
        self._connection.close()

    def check(self, timeout: float) -> None:
        """Gives it up after so many seconds of silence."""
        silent = self._loop.time() - self.heard
        if self._is_open and silent > timeout:
            self._lose(f"no sign of life for {silent:.0f} s")

    def _lose(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._connection)
            self._connection.close()
            self._on_loss(reason)

    def _read(self) -> None:
        try:
            data = self._connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            return self._lose(error.strerror or "the connection broke")
        if not data:
            return self._lose("its launcher is gone")
        self.heard = self._loop.time()
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > _LONGEST_LINE:
            return self._lose("it does not speak as a launcher does")
        for line in lines:
            try:
                message = json.loads(line)
                if message["kind"] != "beat" and self._is_open:
                    self._on_message(message)
            # What a stranger may bring about; a disk that is full, for example, is not its fault.
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return self._lose("it does not speak as a launcher does")
        return None
