"""One attempt of a job: the workers of this launcher, from their start to their end.

Everything arrives as a callback of the event loop. A failure goes to the rendezvous, which returns
the root cause; `_fail_with` then ends the attempt. Without a failure, `_finish` ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping

from etils import epath

from launcher import exit_codes
from launcher.launch.spec import LaunchSpec, WorkerSpec
from launcher.processes.assignment import Assignment, Outcome
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure, failure_from_exit, failure_from_outcome
from launcher.processes.messages import print_line, print_out
from launcher.processes.rank_log import RankFile, finish_logs, is_log_disk_slow, remove_logs
from launcher.processes.signals import STACKS_SIGNAL, STOPPED_AT_ONCE
from launcher.rendezvous import Listener, Rendezvous, Start, open_rendezvous
from launcher.rendezvous.protocol import HEARTBEAT_SECS
from launcher.rendezvous.resolve import find_address
from launcher.rendezvous.root_cause import MakeRootCause, RootCause
from launcher.supervisor import failures
from launcher.supervisor.children import (
    Child,
    is_suspended,
    kill_orphans,
    out_of_memory_kills,
    signals_blocked,
)
from launcher.supervisor.result import AttemptResult
from launcher.supervisor.watchdog import Watchdog, furthest_behind
from trainer.errors import UserError
from trainer.workdir.identity import Identity

# From a worker's outcome to its exit, and from the last worker's exit to that of the other
# launchers.
_EXIT_SECS = 30.0
# For the workers to write their stacks.
_STACKS_SECS = 0.7
# Between SIGCHLD and the last read of a worker's pipes.
_DRAIN_SECS = 0.05
# Lines of jax's C++ parts, on every rank, about what podlift reports itself. The logs have them.
_NOISE = ("[Gloo] Rank ", "Expected number of connected peer ranks", "preemption_notifier.cc")

_INTERRUPTED = 128 + signal.SIGINT


class Attempt:
    """Runs the workers of a launch once.

    Args:
        spec: what to run.
        loop: the event loop.
        environ: the launcher's environment.
        other_children: process ids of children that the attempt must not kill.
    """

    def __init__(
        self,
        spec: LaunchSpec,
        loop: EventLoop,
        environ: Mapping[str, str],
        other_children: set[int],
    ) -> None:
        self._spec = spec
        self._limits = spec.limits
        self._loop = loop
        self._environ = environ
        self._other_children = other_children
        self._rank = spec.workers[0].rank
        self._launcher = f"the launcher of rank {self._rank} on {socket.gethostname()}"
        self._number = 0
        self._children: list[Child] = []
        self._logs: dict[int, RankFile] = {}
        self._folder: Identity | None = None
        self._rendezvous: Rendezvous | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._reaped: set[int] = set()
        self._watchdog = Watchdog(spec.limits.hang_timeout_secs)
        self._asked_to_stop = False
        self._is_closing = False  # from here on the output of workers is only logged
        self._result: AttemptResult | None = None
        self._oom_kills = out_of_memory_kills()

    def run(self) -> AttemptResult:
        """Starts the workers, and returns when no process of theirs is left.

        Raises:
            UserError: the port of the rendezvous is taken.
        """
        try:
            address = self._find_address()
            if self._result is not None:
                return self._result
            self._rendezvous = self._make_rendezvous(address)
            try:
                self._rendezvous.open()
                self._loop.run(lambda: self._result is not None)
            except UserError as error:  # raised here, but the other launchers report it too
                self._report(Failure(self._rank, exit_codes.USAGE, str(error)))
                self._loop.run(lambda: self._result is not None)
            except Exception as error:
                self._report(failures.launcher_raised(self._rank, error))
                self._loop.run(lambda: self._result is not None)
        finally:
            self._clean_up()
        assert self._result is not None
        if self._folder is None:
            return self._result
        # After a usage error the folder is removed with its logs.
        is_usage = self._result.exit_code == exit_codes.USAGE
        is_moved = not is_usage and self._folder.is_moved
        self._folder.close()
        return dataclasses.replace(self._result, is_moved=is_moved)

    # Start

    def _find_address(self) -> str:
        """Where rank 0 listens; empty for all addresses of its host."""
        placement = self._spec.placement
        if placement is None or placement.process_id != 0:
            return ""
        host, seconds = placement.host, self._limits.rendezvous_timeout_secs
        give_up = functools.partial(self._report, failures.not_resolved(self._rank, host, seconds))
        return find_address(
            host, seconds, self._loop, give_up, is_over=lambda: self._result is not None
        )

    def _make_rendezvous(self, address: str) -> Rendezvous:
        listener = Listener(
            on_start=self._start,
            on_end=self._fail_with,
            on_stopping=self._on_other_stopping,
            on_wait=print_out,
        )
        is_alone = self._spec.placement is None
        make_root_cause: MakeRootCause = functools.partial(
            RootCause,
            self._loop,
            # Longer than the failure or the loss of another launcher takes to arrive.
            consequence_secs=0.5 if is_alone else 2 * HEARTBEAT_SECS,
            hang_secs=0.0 if is_alone else self._watchdog.period + HEARTBEAT_SECS,
        )
        period = self._watchdog.period
        return open_rendezvous(self._spec, self._loop, listener, make_root_cause, period, address)

    def _start(self, start: Start) -> None:
        spec = self._spec
        self._number = start.attempt
        with signals_blocked():
            for worker in spec.workers:
                attempt = {"PODLIFT_ATTEMPT": str(start.attempt)}
                environ = {**self._environ, **worker.environ, **attempt}
                label = f"rank {worker.rank} of {spec.num_processes}, {spec.workdir}"
                self._logs[worker.rank] = RankFile(spec.local_dir, start.attempt, worker.rank)
                self._children.append(Child(_assign(spec, worker, start), environ, label=label))
        with contextlib.suppress(OSError):
            self._folder = Identity(epath.Path(spec.local_dir))
        for child in self._children:
            child.listen(
                self._loop,
                functools.partial(self._on_line, child),
                functools.partial(self._on_outcome, child),
                is_log_disk_slow,
            )
        self._call_later(self._watchdog.period, self._watch)

    def _call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls back, unless the attempt is over by then."""
        self._timers.append(self._loop.call_later(seconds, callback))

    # Events of workers

    def _on_line(self, child: Child, line: str, is_error: bool) -> None:
        self._logs[child.rank].write(line)
        shown = self._spec.shown_ranks
        if self._is_closing or (shown is not None and child.rank not in shown):
            return
        if any(noise in line for noise in _NOISE):
            return
        prefix = f"[{child.rank}] " if shown is None or len(shown) > 1 else ""
        print_line(prefix + line, is_error=is_error)

    def _on_outcome(self, child: Child, outcome: Outcome) -> None:
        if outcome.is_failure:
            log = self._logs[child.rank]
            log.write(f"{outcome.trace}error: {outcome.message}")
            self._report(failure_from_outcome(outcome, child.rank, str(log.path)))
        else:
            self._call_later(_EXIT_SECS, child.kill)

    def reap(self) -> None:
        """To be called after SIGCHLD."""
        for child in self._children:
            if child.process.poll() is not None and child.rank not in self._reaped:
                self._reaped.add(child.rank)
                # Its outcome may still be in the pipe.
                self._call_later(_DRAIN_SECS, functools.partial(self._on_exit, child))

    def _on_exit(self, child: Child) -> None:
        if self._is_closing:
            return  # this launcher has killed it
        returncode = child.process.returncode
        if child.outcome is None and self._asked_to_stop and returncode == -signal.SIGTERM:
            # The request came before the worker had installed its handlers.
            child.outcome = Outcome(exit_codes.RETRY, "asked to stop before the first step")
        if child.outcome is None:
            log = self._logs[child.rank]
            oom = out_of_memory_kills() > self._oom_kills
            step = child.page.read().step
            self._report(
                failure_from_exit(returncode, child.rank, step, str(log.path), log.lost_peers, oom)
            )
        elif all(c.process.poll() is not None and c.outcome is not None for c in self._children):
            outcomes = [c.outcome for c in self._children if c.outcome is not None]
            if not any(outcome.is_failure for outcome in outcomes):
                self._finish(outcomes)

    def _finish(self, outcomes: list[Outcome]) -> None:
        """Ends the attempt after all workers here have ended as they should.

        All launchers leave together, because a scheduler that sees one exit kills the others soon
        after.
        """
        assert self._rendezvous is not None
        code = max(outcome.exit_code for outcome in outcomes)
        message = next((o.message for o in outcomes if o.exit_code == code), "")
        deadline = self._loop.time() + _EXIT_SECS
        self._rendezvous.done()

        def leave_with_the_others() -> None:
            assert self._rendezvous is not None
            if self._rendezvous.all_done or self._loop.time() > deadline:
                result = AttemptResult(code, message, None, self._asked_to_stop, self._number)
                self._result = self._result or result
            else:
                self._call_later(0.05, leave_with_the_others)

        leave_with_the_others()

    def _watch(self) -> None:
        """Checks at intervals whether the workers make progress."""
        assert self._rendezvous is not None
        working = [child for child in self._children if child.outcome is None]
        reports = {child.rank: child.page.read() for child in working}
        suspended = {child.rank for child in working if is_suspended(child.pid)}
        stuck = self._watchdog.check(reports, self._loop.time(), suspended)
        if stuck is None:
            for idle in self._watchdog.idle(suspended):
                self._rendezvous.idle(failures.idle(idle, str(self._logs[idle.rank].path)))
            self._call_later(self._watchdog.period, self._watch)
        else:
            self._report(failures.hang(stuck, str(self._logs[stuck.rank].path)))

    def dump_stacks(self) -> str:
        """Has all workers write their stacks into their logs; they continue.

        Returns:
            Where the stacks are; empty if there are no workers.
        """
        for child in self._children:
            child.signal(STACKS_SIGNAL)
        folders = {str(log.path.parent) for log in self._logs.values()}
        return "".join(f"the stacks of its workers are in {folder}" for folder in folders)

    # Failures

    def _report(self, failure: Failure) -> None:
        """Reports a failure; the rendezvous calls `_fail_with` with the root cause."""
        if self._rendezvous is None:  # not yet
            self._fail_with(failure)
        elif not self._is_closing:
            self._rendezvous.report(failure)

    def _fail_with(self, cause: Failure) -> None:
        """Ends the attempt with its root cause."""
        if self._is_closing or self._result is not None:
            return
        self._is_closing = True
        if cause.wants_stacks:
            self.dump_stacks()

        def close() -> None:
            for child in self._children:
                child.kill()
            code = cause.exit_code
            self._result = AttemptResult(code, "", cause, self._asked_to_stop, self._number)

        self._call_later(_STACKS_SECS if cause.wants_stacks else 0.0, close)

    # Requests to stop

    def stop(self, signal_name: str) -> None:
        """Asks all ranks to save and stop."""
        if not self._children:
            self._asked_to_stop = True
            self._report(failures.stopped_before_start(self._rank, self._launcher, signal_name))
        elif not self._asked_to_stop:
            assert self._rendezvous is not None
            self._begin_grace()
            for child in self._children:
                child.signal(signal.SIGTERM)
            self._rendezvous.stopping(f"{signal_name} to {self._launcher}: all ranks save and stop")

    def _on_other_stopping(self, line: str) -> None:
        """Another launcher was asked to stop; jax tells the workers."""
        if not self._asked_to_stop:
            self._begin_grace()
        print_out(line)

    def _begin_grace(self) -> None:
        self._asked_to_stop = True
        self._call_later(self._limits.grace_secs, self._end_grace)

    def _end_grace(self) -> None:
        alive = [child for child in self._children if child.process.poll() is None]
        if alive:
            reports = {child.rank: child.page.read() for child in alive}
            suspended = {child.rank for child in alive if is_suspended(child.pid)}
            rank = furthest_behind(reports, suspended)
            self._report(
                failures.grace_exceeded(
                    rank,
                    reports[rank],
                    self._limits.grace_secs,
                    str(self._logs[rank].path),
                    is_suspended=rank in suspended,
                )
            )

    def kill(self) -> None:
        """Ends everything at once, after a second Ctrl-C."""
        self._is_closing = True
        for child in self._children:
            child.kill()
        if self._rendezvous is not None:
            self._rendezvous.abandon(failures.killed_by_user(self._rank, self._launcher))
        for log in self._logs.values():
            log.write(STOPPED_AT_ONCE)
        self._result = AttemptResult(_INTERRUPTED, STOPPED_AT_ONCE, None, True, self._number)

    # End

    def _clean_up(self) -> None:
        """Leaves no process, no open file and no connection behind."""
        self._is_closing = True
        for child in self._children:
            child.kill()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # blocked inside the kernel
                child.process.wait(timeout=5)
        alive = {child.pid for child in self._children if child.process.poll() is None}
        kill_orphans(alive | self._other_children)
        for timer in self._timers:
            timer.cancel()
        is_drained: list[bool] = []
        self._loop.call_later(_DRAIN_SECS, lambda: is_drained.append(True))
        self._loop.run(lambda: bool(is_drained))  # the last lines are still in the pipes
        if self._rendezvous is not None:
            self._rendezvous.leave()
        for child in self._children:
            child.close(self._loop)
        finish_logs(list(self._logs.values()))
        if self._result is not None and self._result.exit_code == exit_codes.USAGE:
            remove_logs(self._logs.values())


def _assign(spec: LaunchSpec, worker: WorkerSpec, start: Start) -> Assignment:
    limits = spec.limits
    return Assignment(
        rank=worker.rank,
        num_processes=spec.num_processes,
        coordinator=start.coordinator or None,
        address=start.address,
        local_device_ids=worker.local_device_ids,
        start_timeout_secs=max(30, int(limits.rendezvous_timeout_secs)),
        shutdown_timeout_secs=limits.shutdown_timeout_secs,
        workdir=spec.workdir,
        resumes=spec.folder.exists,
        local_dir=spec.local_base,
        config=spec.config,
        profile=spec.profile,
        attempt=start.attempt,
        parent=os.getpid(),
        smoke=spec.smoke,
    )
