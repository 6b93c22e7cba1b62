"""The event loop: files, signals and timers in one thread."""

from __future__ import annotations

import os
import signal
import socket
import threading

import pytest
from messages import LONG

from launcher.processes.event_loop import EventLoop


def test_timers_expire_in_order_unless_cancelled():
    called = []
    with EventLoop() as loop:
        loop.call_later(0.02, lambda: called.append("second"))
        loop.call_later(0.01, lambda: called.append("first"))
        loop.call_later(0.015, lambda: called.append("cancelled")).cancel()
        loop.run(lambda: len(called) == 2)
    assert called == ["first", "second"]


def test_a_condition_that_holds_already_runs_nothing():
    called = []
    with EventLoop() as loop:
        loop.call_later(0.0, lambda: called.append(1))
        loop.run(lambda: True)
        assert called == []
        loop.run(lambda: bool(called))


def test_every_arrival_of_a_signal_calls_back_and_previous_handlers_return():
    arrived = []

    def previous(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGUSR1, previous)
    try:
        with EventLoop() as loop:
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
                loop.add_signal_handler(number, lambda number=number: arrived.append(number))
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            loop.run(lambda: len(arrived) == 3)
        assert arrived == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is previous
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_exception_of_a_callback_is_raised_and_the_loop_runs_on():
    called = []

    def fail(name):
        called.append(name)
        raise OSError(name)

    with EventLoop() as loop:
        for name in ("first", "second"):  # of one round
            loop.call_later(0.0, lambda name=name: fail(name))
        loop.call_later(0.01, lambda: called.append("last"))
        with pytest.raises(OSError, match="first"):
            loop.run(lambda: False)
        with pytest.raises(OSError, match="second"):
            loop.run(lambda: False)
        loop.run(lambda: "last" in called)
    assert called == ["first", "second", "last"]


def test_a_file_that_another_callback_of_the_round_has_closed_is_not_read():
    ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
    read = []
    with EventLoop() as loop:

        def close_other(mine, other):
            read.append(mine)
            loop.remove_reader(other)
            other.close()
            loop.remove_reader(mine)

        for mine, other in (ours, ours[::-1]):
            loop.add_reader(mine, lambda mine=mine, other=other: close_other(mine, other))
        for file in theirs:
            file.sendall(b"x")
        loop.run(lambda: bool(read))
        done = []
        loop.call_later(0.01, lambda: done.append(1))
        loop.run(lambda: bool(done))
    assert len(read) == 1
    for file in (*ours, *theirs):
        file.close()


def test_a_call_that_blocks_holds_up_neither_signals_nor_the_end():
    released, found = threading.Event(), []
    try:
        with EventLoop() as loop:
            loop.add_signal_handler(signal.SIGUSR1, lambda: found.append("signal"))
            loop.call_in_thread(lambda: 1 // 1, found.append, found.append)
            loop.run(lambda: found == [1])
            loop.call_in_thread(lambda: 1 // 0, found.append, found.append)
            loop.run(lambda: len(found) == 2)
            assert isinstance(found[1], ZeroDivisionError)
            loop.call_in_thread(lambda: released.wait(LONG), found.append, found.append)
            os.kill(os.getpid(), signal.SIGUSR1)
            loop.run(lambda: len(found) == 3)
    finally:
        released.set()  # its thread finds a closed loop, and says nothing
    assert found[2] == "signal"
