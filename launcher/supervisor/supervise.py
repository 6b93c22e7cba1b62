"""A supervised run: attempts, restarts, and what the terminal shows of them.

This process never imports jax, so it starts at once and survives a worker's runtime.
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
from launcher.processes.messages import flush, how_to_resume, print_err, print_out
from launcher.processes.signals import STACKS_SIGNAL, STOP_SIGNALS
from launcher.supervisor.attempt import Attempt
from launcher.supervisor.children import adopt_orphans, child_pids
from launcher.supervisor.restarts import backoff_secs, why_no_restart
from launcher.supervisor.result import AttemptResult


def supervise(spec: LaunchSpec, environ: Mapping[str, str] = os.environ) -> int:
    """Runs a launch to its end; returns the exit code.

    Raises:
        UserError: the port of the rendezvous is taken.
    """
    if spec.placement is not None and spec.placement.process_id == 0:
        print_out(describe_placement(spec.placement))
    adopt_orphans()
    try:
        with EventLoop() as loop:
            return _Supervisor(spec, loop, environ).run()
    finally:
        flush()


class _Supervisor:
    def __init__(self, spec: LaunchSpec, loop: EventLoop, environ: Mapping[str, str]) -> None:
        self._spec = spec
        self._loop = loop
        self._environ = environ
        self._other_children = child_pids()
        self._attempt: Attempt | None = None
        self._asked_to_stop = False
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                loop.add_signal_handler(number, functools.partial(self._request_stop, number))
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(STACKS_SIGNAL, self._dump_stacks)

    def run(self) -> int:
        max_restarts = self._spec.limits.max_restarts
        previous: Failure | None = None
        restarts = 0
        while True:
            self._attempt = Attempt(self._spec, self._loop, self._environ, self._other_children)
            result = self._attempt.run()
            self._attempt = None
            why_not = why_no_restart(result, previous, restarts, max_restarts)
            self._report(result, restarts=why_not is None)
            if why_not is not None:
                if why_not:
                    print_out(why_not)
                return result.exit_code
            previous = result.failure
            delay = backoff_secs(restarts, result.failure)
            restarts += 1
            soon = f" in {delay:.0f} s" if delay else ""
            print_out(f"restart {restarts} of {max_restarts}{soon}")
            if self._wait(delay):
                return exit_codes.RETRY

    def _wait(self, seconds: float) -> bool:
        """Waits; returns early, with True, if asked to stop."""
        due: list[bool] = []
        timer = self._loop.call_later(seconds, lambda: due.append(True))
        self._loop.run(lambda: bool(due) or self._asked_to_stop)
        timer.cancel()
        return self._asked_to_stop

    def _reap(self) -> None:
        if self._attempt is not None:
            self._attempt.reap()

    def _dump_stacks(self) -> None:
        found = self._attempt is not None and self._attempt.dump_stacks()
        name = signal.Signals(STACKS_SIGNAL).name
        print_out(f"{name}: {found or 'there are no workers now'}; the run continues")

    def _request_stop(self, number: int) -> None:
        """Stops the run after a save, or at once after a second Ctrl-C."""
        again = self._asked_to_stop
        self._asked_to_stop = True
        if self._attempt is not None and again and number == signal.SIGINT:
            self._attempt.kill()
        elif not again:
            if self._attempt is not None:
                self._attempt.stop(signal.Signals(number).name)
            more = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            print_out(f"{signal.Signals(number).name}: saving, then stopping{more}")

    def _report(self, result: AttemptResult, *, restarts: bool) -> None:
        """Prints how an attempt ended, and writes or clears `failure.json`."""
        spec = self._spec
        if result.failure is not None:
            self._report_failure(result, restarts=restarts)
        elif spec.has_rank_0 and not result.is_moved:
            with contextlib.suppress(OSError):
                clear_failure(spec.local_dir)
            if result.message:
                print_err(f"{result.message}\n  {how_to_resume(spec.workdir, smoke=spec.smoke)}")

    def _report_failure(self, result: AttemptResult, *, restarts: bool) -> None:
        spec, failure, attempt = self._spec, result.failure, result.number
        assert failure is not None
        # One traceback a job, also where all its launchers write to one place.
        text = failure.to_text(with_trace=spec.has_rank_0)
        is_usage = failure.exit_code == exit_codes.USAGE
        if spec.has_rank_0 and not is_usage and not restarts and not result.is_moved:
            in_memory = spec.settings.fast_every_secs > 0
            hint = how_to_resume(spec.workdir, smoke=spec.smoke, in_memory=in_memory)
            text += f"\n  {hint}"
        print_err(text)
        # A folder that has the name by now is another run's.
        if spec.has_rank_0 and not is_usage and attempt and not result.is_moved:
            try:
                write_failure(
                    spec.local_dir, failure, rank=failure.rank, log=failure.log, attempt=attempt
                )
            except OSError as error:
                print_err(f"warning: failure.json cannot be written: {error.strerror or error}")
