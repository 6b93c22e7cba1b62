"""Signals that ask a run to save and stop."""

from __future__ import annotations

import os
import signal

import pytest

from launcher.processes.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU"])
def test_every_notice_of_a_scheduler_asks_to_stop(number):
    before = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    request = StopRequest()
    request.install()
    try:
        assert not request(0, "train")
        os.kill(os.getpid(), signal.Signals[f"SIG{number}"])
        assert request(0, "train")
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
