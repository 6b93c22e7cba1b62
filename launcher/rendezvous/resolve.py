"""Looks up this machine's address while signals and timers go on: a resolver may not answer."""

from __future__ import annotations

from collections.abc import Callable

from launcher.processes.event_loop import EventLoop
from launcher.processes.messages import print_out
from launcher.rendezvous.address import own_address

_REMIND_SECS = 10.0


def find_address(
    host: str,
    seconds: float,
    loop: EventLoop,
    give_up: Callable[[], None],
    *,
    is_over: Callable[[], bool],
    look_up: Callable[[str], str] = own_address,
) -> str:
    """The address of this machine that others reach as `host`; empty if unknown.

    Args:
        host: a name.
        seconds: the time that the resolver has.
        loop: runs meanwhile.
        give_up: called when the time is over.
        is_over: whether to stop waiting.
        look_up: returns the address; may block for ever.
    """
    found: list[str] = []
    loop.call_in_thread(lambda: look_up(host), found.append, lambda error: found.append(""))
    timers = [
        loop.call_later(seconds, give_up),
        loop.call_later(
            _REMIND_SECS,
            lambda: print_out(f"waiting for the name {host} to resolve ({_REMIND_SECS:.0f} s)"),
        ),
    ]
    loop.run(lambda: bool(found) or is_over())
    for timer in timers:
        timer.cancel()
    return found[0] if found else ""
