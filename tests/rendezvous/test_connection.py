"""One connection between two launchers."""

from __future__ import annotations

import socket

import pytest

from launcher.processes.event_loop import EventLoop
from launcher.rendezvous.connection import Connection


def test_only_a_malformed_message_ends_a_connection_not_an_error_while_it_is_handled():
    lost = []

    def claim(message):
        raise OSError(28, "No space left on device")

    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with EventLoop() as loop, theirs:
        connection = Connection(loop, ours, claim, lost.append)
        theirs.sendall(b'{"kind": "start"}\n')
        with pytest.raises(OSError, match="No space left"):
            loop.run(lambda: bool(lost))
        assert lost == []
        theirs.sendall(b"hello\n")
        loop.run(lambda: bool(lost))
        assert lost == ["what it sends is not the protocol of a launcher"]
        connection.close()
