"""One attempt of a job: the workers of this launcher from their start to their end.

What happens arrives as callbacks of the loop. A failure is reported to the meeting, which comes
back with the story that ends the attempt (`_close_with`); everything else ends well (`_all_done`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher import exit_codes
from launcher.launch.spec import LaunchSpec
from launcher.processes.assignment import Assignment, Outcome
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure, failure_from_exit, failure_from_outcome
from launcher.processes.messages import show
from launcher.processes.rank_log import RankFile, remove_logs
from launcher.processes.signals import STACKS_SIGNAL, STOPPED_AT_ONCE
from launcher.rendezvous import Listener, Rendezvous, Start, open_rendezvous
from launcher.rendezvous.protocol import HEARTBEAT_SECS
from launcher.rendezvous.root_cause import MakeRootCause, RootCause
from launcher.supervisor.children import (
    Child,
    is_suspended,
    kill_orphans,
    out_of_memory_kills,
    signals_held_back,
)
from launcher.supervisor.watchdog import Watchdog
from trainer.errors import UserError

# After all is said, until a worker must be gone, and the other launchers must be done.
_EXIT_SECS = 30.0
# For the stacks to arrive.
_STACKS_SECS = 0.7
# Of jax's C++ parts, on every rank, about what podlift reports itself; kept in the logs.
_NOISE = ("[Gloo] Rank ", "Expected number of connected peer ranks", "preemption_notifier.cc")


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended.

    Attributes:
        exit_code: of `launcher.exit_codes`, or 130.
        message: for a person, where it ended as asked.
        failure: what went wrong, if anything did.
        asked_to_stop: whether anyone had asked it to stop.
        number: of the attempt, counted over the life of the workdir; 0 if it never began.
    """

    exit_code: int
    message: str = ""
    failure: Failure | None = None
    asked_to_stop: bool = False
    number: int = 0


class Attempt:
    """Runs the workers of a plan once.

    Args:
        plan: what is run.
        loop: entered.
        environ: the launcher's environment.
        other_children: children of this process that are none of its workers' making.
    """

    def __init__(
        self,
        plan: LaunchSpec,
        loop: EventLoop,
        environ: Mapping[str, str],
        other_children: set[int],
    ) -> None:
        self._plan = plan
        self._limits = plan.limits
        self._loop = loop
        self._environ = environ
        self._other_children = other_children
        self._rank = plan.workers[0].rank
        self._number = 0
        self._children: list[Child] = []
        self._files: dict[int, RankFile] = {}
        self._meeting: Rendezvous | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._reaped: set[int] = set()
        self._watchdog = Watchdog(plan.limits.hang_timeout_secs)
        self._asked_to_stop = False
        self._is_closing = False  # it has failed: what workers say is only logged
        self._ending: AttemptResult | None = None
        self._oom_kills = out_of_memory_kills()

    def run(self) -> AttemptResult:
        """Starts everything and returns when nothing of it is left.

        Raises:
            UserError: the place where the ranks are to meet is not to be had.
        """
        try:
            self._meeting = self._make_meeting()
            try:
                self._meeting.open()
                self._loop.run(lambda: self._ending is not None)
            except UserError as error:  # found by the launcher itself: the others are to know
                self._report(Failure(self._rank, exit_codes.USAGE, str(error)))
                self._loop.run(lambda: self._ending is not None)
            except Exception as error:
                message = f"{type(error).__name__} in the launcher of rank {self._rank}: {error}"
                trace = traceback.format_exc()
                self._report(Failure(self._rank, exit_codes.FAILED, message, trace=trace))
                self._loop.run(lambda: self._ending is not None)
        finally:
            self._clean_up()
        assert self._ending is not None
        return self._ending

    # The start

    def _make_meeting(self) -> Rendezvous:
        plan, placement = self._plan, self._plan.placement
        listener = Listener(
            on_start=self._start,
            on_end=self._close_with,
            on_stopping=self._other_stopping,
            on_wait=lambda line: show(line, is_error=False),
        )
        make_verdict: MakeRootCause = functools.partial(
            RootCause,
            self._loop,
            # Longer than another launcher's failure or loss takes to be known here.
            consequence_secs=0.5 if placement is None else 2 * HEARTBEAT_SECS,
            hang_secs=0.0 if placement is None else self._watchdog.period + HEARTBEAT_SECS,
        )
        return open_rendezvous(plan, self._loop, listener, make_verdict, self._watchdog.period)

    def _start(self, start: Start) -> None:
        plan = self._plan
        self._number = start.attempt
        with signals_held_back():
            for worker in plan.workers:
                assignment = Assignment(
                    rank=worker.rank,
                    num_processes=plan.num_processes,
                    coordinator=start.coordinator or None,
                    address=start.address,
                    local_device_ids=worker.local_device_ids,
                    heartbeat_timeout_secs=self._limits.heartbeat_timeout_secs,
                    start_timeout_secs=max(30, int(self._limits.rendezvous_timeout_secs)),
                    shutdown_timeout_secs=self._limits.shutdown_timeout_secs,
                    workdir=plan.workdir,
                    local_dir=plan.local_base,
                    config=plan.config,
                    profile=plan.profile,
                    attempt=start.attempt,
                    parent=os.getpid(),
                    smoke=plan.smoke,
                )
                attempt = {"PODLIFT_ATTEMPT": str(start.attempt)}
                environ = {**self._environ, **worker.environ, **attempt}
                label = f"rank {worker.rank} of {plan.num_processes}, {plan.workdir}"
                self._files[worker.rank] = RankFile(plan.local_dir, start.attempt, worker.rank)
                self._children.append(Child(assignment, environ, label=label))
        for child in self._children:
            child.listen(
                self._loop,
                functools.partial(self._relay, child),
                functools.partial(self._heard, child),
            )
        self._later(self._watchdog.period, self._watch)

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls back unless the attempt is over by then."""
        self._timers.append(self._loop.call_later(seconds, callback))

    # What workers say and do

    def _relay(self, child: Child, line: str, is_error: bool) -> None:
        self._files[child.rank].write(line)
        shown = self._plan.shown_ranks
        if self._is_closing or (shown is not None and child.rank not in shown):
            return
        if any(noise in line for noise in _NOISE):
            return
        prefix = f"[{child.rank}] " if shown is None or len(shown) > 1 else ""
        show(prefix + line, is_error=is_error)

    def _heard(self, child: Child, outcome: Outcome) -> None:
        """A worker has said how it ended."""
        if outcome.is_failure:
            log = self._files[child.rank]
            log.write(f"{outcome.trace}error: {outcome.message}")
            self._report(failure_from_outcome(outcome, child.rank, str(log.path)))
        else:
            self._later(_EXIT_SECS, child.kill)

    def reap(self) -> None:
        """To be called after SIGCHLD."""
        for child in self._children:
            if child.process.poll() is not None and child.rank not in self._reaped:
                self._reaped.add(child.rank)
                # Its last words may still be in the pipes.
                self._later(0.05, functools.partial(self._worker_gone, child))

    def _worker_gone(self, child: Child) -> None:
        if self._is_closing:
            return  # by our hand
        returncode = child.process.returncode
        if child.outcome is None and self._asked_to_stop and returncode == -signal.SIGTERM:
            # It had not even begun to listen.
            child.outcome = Outcome(exit_codes.RETRY, "asked to stop before the first step")
        if child.outcome is None:
            log = self._files[child.rank]
            oom = out_of_memory_kills() > self._oom_kills
            step = child.page.read().step
            self._report(
                failure_from_exit(returncode, child.rank, step, str(log.path), log.tail, oom)
            )
        elif all(c.process.poll() is not None and c.outcome is not None for c in self._children):
            outcomes = [c.outcome for c in self._children if c.outcome is not None]
            if not any(outcome.is_failure for outcome in outcomes):
                self._all_done(outcomes)

    def _all_done(self, outcomes: list[Outcome]) -> None:
        """All workers here have ended as they should.

        All launchers leave together: a scheduler that sees one go ends the others soon after.
        """
        assert self._meeting is not None
        code = max(outcome.exit_code for outcome in outcomes)
        message = next((o.message for o in outcomes if o.exit_code == code), "")
        deadline = self._loop.time() + _EXIT_SECS
        self._meeting.done()

        def wait() -> None:
            assert self._meeting is not None
            if self._meeting.all_done or self._loop.time() > deadline:
                ending = AttemptResult(code, message, None, self._asked_to_stop, self._number)
                self._ending = self._ending or ending
            else:
                self._later(0.05, wait)

        wait()

    def _watch(self) -> None:
        """Looks whether the workers move on."""
        said = {c.rank: c.page.read() for c in self._children if c.outcome is None}
        stuck = self._watchdog.look(said, self._loop.time())
        if stuck is None:
            self._later(self._watchdog.period, self._watch)
            return
        pid = next(child.pid for child in self._children if child.rank == stuck.rank)
        suspended = ", and is suspended (SIGSTOP)" if is_suspended(pid) else ""
        self._report(
            Failure(
                stuck.rank,
                exit_codes.RETRY,
                f"rank {stuck.rank} has made no progress for {stuck.seconds:.0f} s, at step "
                f"{stuck.progress.step} ({stuck.progress.phase}){suspended}\n  HINT: the stacks of "
                "all ranks are in their logs; if it is only slow, raise --hang_timeout_secs",
                step=stuck.progress.step,
                log=str(self._files[stuck.rank].path),
                wants_stacks=True,
                count=stuck.progress.count,
            )
        )

    def dump_stacks(self) -> None:
        """Writes the stacks of all workers into their logs; they go on."""
        for child in self._children:
            child.signal(STACKS_SIGNAL)

    # Failure

    def _report(self, failure: Failure) -> None:
        """Something has failed here; what becomes the story comes back to `_close_with`."""
        assert self._meeting is not None
        if not self._is_closing:
            self._meeting.report(failure)

    def _close_with(self, failure: Failure) -> None:
        """Ends the attempt with its story."""
        if self._is_closing or self._ending is not None:
            return
        self._is_closing = True
        if failure.wants_stacks:
            self.dump_stacks()

        def close() -> None:
            for child in self._children:
                child.kill()
            code = failure.exit_code
            self._ending = AttemptResult(code, "", failure, self._asked_to_stop, self._number)

        self._later(_STACKS_SECS if failure.wants_stacks else 0.0, close)

    # Being asked to stop

    def stop(self, signal_name: str) -> None:
        """Asks all ranks to save and to stop."""
        line = f"{signal_name} to the launcher of rank {self._rank} on {socket.gethostname()}"
        if not self._children:
            self._asked_to_stop = True
            line += ", before all ranks were there"
            self._report(Failure(self._rank, exit_codes.RETRY, line))
        elif not self._asked_to_stop:
            assert self._meeting is not None
            self._begin_to_stop()
            for child in self._children:
                child.signal(signal.SIGTERM)
            self._meeting.stopping(f"{line}: all ranks save and stop")

    def _other_stopping(self, line: str) -> None:
        """Another launcher was asked to stop; jax lets the workers know."""
        if not self._asked_to_stop:
            self._begin_to_stop()
        show(line, is_error=False)

    def _begin_to_stop(self) -> None:
        self._asked_to_stop = True
        self._later(self._limits.grace_secs, self._grace_is_over)

    def _grace_is_over(self) -> None:
        late = next((child for child in self._children if child.process.poll() is None), None)
        if late is None:
            return
        progress = late.page.read()
        self._report(
            Failure(
                late.rank,
                exit_codes.RETRY,
                f"rank {late.rank} has not stopped within {self._limits.grace_secs:g} s (step "
                f"{progress.step}, {progress.phase}), and was killed\n"
                "  HINT: --grace_secs waits longer",
                step=progress.step,
                log=str(self._files[late.rank].path),
                wants_stacks=True,
            )
        )

    def kill(self) -> None:
        """Ends everything at once, for a person who does not want to wait."""
        self._is_closing = True
        for child in self._children:
            child.kill()
        if self._meeting is not None:
            who = f"the launcher of rank {self._rank} on {socket.gethostname()}"
            line = f"{who} was stopped at once (Ctrl-C)"
            self._meeting.abandon(Failure(self._rank, exit_codes.RETRY, line))
        for file in self._files.values():
            file.write(STOPPED_AT_ONCE)
        code = 128 + signal.SIGINT
        self._ending = AttemptResult(code, STOPPED_AT_ONCE, None, True, self._number)

    # The end

    def _clean_up(self) -> None:
        """Leaves no process, no open file and no connection behind."""
        self._is_closing = True
        for child in self._children:
            child.kill()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel's hands
                child.process.wait(timeout=5)
        alive = {child.pid for child in self._children if child.process.poll() is None}
        kill_orphans(alive | self._other_children)
        for timer in self._timers:
            timer.cancel()
        is_over: list[bool] = []
        self._loop.call_later(0.05, lambda: is_over.append(True))
        self._loop.run(lambda: bool(is_over))  # what is left in the pipes
        if self._meeting is not None:
            self._meeting.leave()
        for child in self._children:
            child.close(self._loop)
        for file in self._files.values():
            file.close()
        if self._ending is not None and self._ending.exit_code == exit_codes.USAGE:
            remove_logs(self._files.values())
