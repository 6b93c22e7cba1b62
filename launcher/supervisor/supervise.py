"""A supervised run: attempts, what is tried again, and what is told at the end.

This process never imports jax: it starts at once, and stays when a worker's runtime dies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Mapping

from launcher import exit_codes
from launcher.launch.dry_run import describe_placement
from launcher.launch.spec import LaunchSpec
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure, clear_failure, write_failure
from launcher.processes.messages import flush, how_to_resume, print_out, show
from launcher.processes.signals import STACKS_SIGNAL, STOP_SIGNALS
from launcher.supervisor.attempt import Attempt, AttemptResult
from launcher.supervisor.children import adopt_orphans, children


def supervise(plan: LaunchSpec, environ: Mapping[str, str] = os.environ) -> int:
    """Runs a plan to its end; returns the exit code.

    Raises:
        UserError: the place where the ranks are to meet is not to be had.
    """
    if plan.placement is not None and plan.placement.process_id == 0:
        print_out(describe_placement(plan.placement))
    adopt_orphans()
    try:
        with EventLoop() as loop:
            return _Supervisor(plan, loop, environ).run()
    finally:
        flush()


class _Supervisor:
    def __init__(self, plan: LaunchSpec, loop: EventLoop, environ: Mapping[str, str]) -> None:
        self._plan = plan
        self._loop = loop
        self._environ = environ
        self._other_children = children()
        self._attempt: Attempt | None = None
        self._asked_to_stop = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, functools.partial(self._asked, number))
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(STACKS_SIGNAL, self._dump_stacks)

    def run(self) -> int:
        previous: Failure | None = None
        restarts = 0
        while True:
            self._attempt = Attempt(self._plan, self._loop, self._environ, self._other_children)
            ending = self._attempt.run()
            self._attempt = None
            why_not = why_not_again(ending, previous, restarts, self._plan.limits.max_restarts)
            self._tell(ending, goes_on=why_not is None)
            if why_not is not None:
                if why_not:
                    print_out(why_not)
                return ending.exit_code
            previous = ending.failure
            delay = backoff_secs(restarts, ending.failure)
            restarts += 1
            soon = f" in {delay:.0f} s" if delay else ""
            print_out(f"restart {restarts} of {self._plan.limits.max_restarts}{soon}")
            if self._wait(delay):
                return exit_codes.RETRY

    def _wait(self, seconds: float) -> bool:
        """Returns early, with True, if asked to stop."""
        due: list[bool] = []
        timer = self._loop.call_later(seconds, lambda: due.append(True))
        self._loop.run(lambda: bool(due) or self._asked_to_stop)
        timer.cancel()
        return self._asked_to_stop

    def _reap(self) -> None:
        if self._attempt is not None:
            self._attempt.reap()

    def _dump_stacks(self) -> None:
        if self._attempt is not None:
            self._attempt.dump_stacks()

    def _asked(self, number: int) -> None:
        """A signal asks to stop; a second Ctrl-C does not want to wait."""
        again = self._asked_to_stop
        self._asked_to_stop = True
        if self._attempt is not None and again and number == signal.SIGINT:
            self._attempt.kill()
        elif not again:
            if self._attempt is not None:
                self._attempt.stop(signal.Signals(number).name)
            more = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            print_out(f"{signal.Signals(number).name}: saving, then stopping{more}")

    def _tell(self, ending: AttemptResult, *, goes_on: bool) -> None:
        """Says how an attempt ended, and leaves it in `failure.json`."""
        failure, plan = ending.failure, self._plan
        copies = plan.settings.fast_every_secs > 0
        has_rank_0 = plan.has_rank_0
        if failure is not None:
            # One traceback for a job whose launchers all write to one place.
            text = failure.tell(brief=not has_rank_0)
            if failure.exit_code != exit_codes.USAGE and has_rank_0 and not goes_on:
                text += "\n  " + how_to_resume(plan.workdir, smoke=plan.smoke, in_memory=copies)
            show(text)
            if failure.exit_code != exit_codes.USAGE and ending.number and has_rank_0:
                try:
                    write_failure(
                        plan.local_dir,
                        failure,
                        rank=failure.rank,
                        log=failure.log,
                        attempt=ending.number,
                    )
                except OSError as error:
                    show(f"warning: failure.json cannot be written: {error.strerror or error}")
            return
        if has_rank_0:
            with contextlib.suppress(OSError):
                clear_failure(plan.local_dir)
            if ending.message:
                show(f"{ending.message}\n  {how_to_resume(plan.workdir, smoke=plan.smoke)}")


def why_not_again(
    ending: AttemptResult, previous: Failure | None, restarts: int, max_restarts: int
) -> str | None:
    """None if an attempt is to be followed by another; else why not, empty if that is plain.

    Args:
        ending: of the attempt.
        previous: the failure of the attempt before it, if there was one.
        restarts: how many there were.
        max_restarts: how many there may be.
    """
    failure = ending.failure
    if failure is None or ending.asked_to_stop or failure.exit_code == exit_codes.USAGE:
        return ""
    if max_restarts == 0:
        return ""
    if (
        failure.exit_code == exit_codes.FAILED
        and previous is not None
        and previous.exit_code == exit_codes.FAILED
        and previous.step == failure.step
    ):
        at = "" if failure.step is None else f" at step {failure.step}"
        return f"failed twice{at}: a restart would most likely fail there again"
    if restarts >= max_restarts:
        return f"no restart left (--max_restarts={max_restarts})"
    return None


def backoff_secs(restarts: int, failure: Failure | None) -> float:
    """Seconds before the next restart: 1, 2, 4, ... up to a minute.

    The first comes at once where the attempt had taken steps: then what failed is no mistake of the
    start, and nothing is gained by waiting.
    """
    if restarts == 0 and failure is not None and failure.step:
        return 0.0
    return float(min(60, 2 ** min(restarts, 6)))
