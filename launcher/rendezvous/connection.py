"""One connection between two launchers."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any

from launcher.processes.event_loop import EventLoop

_MAX_LINE_BYTES = 1 << 20
# From a side that has not proved that it belongs to the job. A handshake takes 300; an older
# podlift sends its config first, and is to be told why it is refused.
_MAX_BYTES_OF_STRANGERS = 1 << 16
NO_LAUNCHER = "what it sends is not the protocol of a launcher"


class Connection:
    """Lines of JSON in both directions, with heartbeats.

    Until `trust` is called, the other side may be anybody, and may send little.

    Args:
        loop: of this launcher.
        connected: the socket, which this takes over.
        on_message: gets every message but heartbeats.
        on_loss: gets the reason, once, if the connection ends by anything but `close`.
    """

    def __init__(
        self,
        loop: EventLoop,
        connected: socket.socket,
        on_message: Callable[[dict[str, Any]], None],
        on_loss: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._socket = connected
        self._on_message = on_message
        self._on_loss = on_loss
        self._received = b""
        self._unsent = b""
        self._is_open = True
        self._is_trusted = False
        self._num_bytes = 0
        self._last_heard = loop.time()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        loop.add_reader(connected, self._read)

    def trust(self) -> None:
        """Accepts what a launcher of the job may send."""
        self._is_trusted = True

    def send(self, kind: str, **values: Any) -> None:
        """Sends one message. What the socket does not accept goes out with the next one."""
        if not self._is_open:
            return
        self._unsent += json.dumps({"kind": kind, **values}).encode() + b"\n"
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error.strerror or "the connection broke")

    def close(self) -> None:
        """Closes the connection, after a last attempt to send what is left."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._socket)
        with contextlib.suppress(OSError):
            if self._unsent:
                self._socket.settimeout(1.0)
                self._socket.sendall(self._unsent)
        self._socket.close()

    def check(self, timeout: float) -> None:
        """Drops the connection after `timeout` seconds without a message."""
        silent = self._loop.time() - self._last_heard
        if self._is_open and silent > timeout:
            self._lose(f"no heartbeat for {silent:.0f} s")

    def _lose(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._on_loss(reason)

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            return self._lose(error.strerror or "the connection broke")
        if not data:
            return self._lose("its launcher is gone")
        self._last_heard = self._loop.time()
        self._num_bytes += len(data)
        if not self._is_trusted and self._num_bytes > _MAX_BYTES_OF_STRANGERS:
            return self._lose(NO_LAUNCHER)
        *lines, self._received = (self._received + data).split(b"\n")
        if max(map(len, (*lines, self._received))) > _MAX_LINE_BYTES:
            return self._lose(NO_LAUNCHER)
        for line in lines:
            try:
                message = json.loads(line)
                if message["kind"] != "heartbeat" and self._is_open:
                    self._on_message(message)
            # Malformed messages only: an error of this launcher, such as a full disk, has to reach
            # the loop.
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return self._lose(NO_LAUNCHER)
        return None
