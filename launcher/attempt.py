"""One attempt of a job: the workers of this launcher from their start to their end.

Everything that happens arrives as a callback of the reactor; what ends the attempt is decided in
one place (`_decide`), and reported once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from launcher import exit_codes
from launcher.assignment import Assignment, Outcome
from launcher.children import (
    Child,
    is_suspended,
    kill_orphans,
    out_of_memory_kills,
    signals_held_back,
)
from launcher.failure import CONSEQUENCE, Failure, first, of_exit, of_outcome
from launcher.meeting import Card, Guest, Host, Listener, Start
from launcher.meeting.address import hold_port, own_address
from launcher.plan import Plan, host_name
from launcher.rank_log import RankFile, next_attempt, remove_logs
from launcher.reactor import Reactor, Timer
from launcher.signals import STACKS_SIGNAL
from launcher.telling import show
from launcher.watchdog import Watchdog
from trainer.console import say
from trainer.errors import UserError
from trainer.version import __version__

# How long to wait for a likelier cause before a failure becomes the story: what a rank's end does
# to the others is seen within milliseconds.
_SETTLE_SECS = 0.1
_SETTLE_CONSEQUENCE_SECS = 0.5
# After all is said, until a worker must be gone.
_EXIT_SECS = 30.0
# For the stacks to arrive.
_STACKS_SECS = 0.7
# Of jax's C++ parts, on every rank, about what podlift reports itself; kept in the logs.
_NOISE = ("[Gloo] Rank ", "Expected number of connected peer ranks", "preemption_notifier.cc")


@dataclass(frozen=True)
class Ending:
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
        reactor: entered.
        environ: the launcher's environment.
    """

    def __init__(self, plan: Plan, reactor: Reactor, environ: Mapping[str, str]) -> None:
        self._plan = plan
        self._limits = plan.limits
        self._reactor = reactor
        self._environ = environ
        self._number = 0
        self._children: list[Child] = []
        self._files: dict[int, RankFile] = {}
        self._meeting: Host | Guest | None = None
        self._held_port: socket.socket | None = None
        self._timers: list[Timer] = []
        self._suspects: list[Failure] = []
        self._judged: set[int] = set()
        self._watchdog = Watchdog(plan.limits.hang_timeout_secs)
        self._is_closing = False
        self._asked_to_stop = False
        self._ending: Ending | None = None
        self._oom_kills = out_of_memory_kills()

    def run(self) -> Ending:
        """Starts everything and returns when nothing of it is left."""
        try:
            if self._plan.placement is None:
                self._start_alone()
            else:
                self._meet()
            self._reactor.run(lambda: self._ending is not None)
        finally:
            self._bury()
        assert self._ending is not None
        return self._ending

    # The start

    def _start_alone(self) -> None:
        number = next_attempt(self._plan.local_dir)
        if self._plan.num_processes == 1:
            self._start(Start("", number, "127.0.0.1"))
            return
        self._held_port = hold_port("127.0.0.1")
        port = self._held_port.getsockname()[1]
        self._start(Start(f"127.0.0.1:{port}", number, "127.0.0.1"))

    def _meet(self) -> None:
        """Finds the other launchers; the workers start when all are there."""
        import importlib.metadata

        placement = self._plan.placement
        assert placement is not None
        packages = ("jax", "jaxlib", "flax", "optax")
        versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
        card = Card(
            rank=placement.process_id,
            size=placement.num_processes,
            host=host_name(),
            job=placement.job,
            config=self._plan.config,
            versions=", ".join(
                [f"podlift {__version__}", f"Python {platform.python_version()}", *versions]
            ),
            workdir=self._plan.workdir,
            sees_run=self._plan.sees_run,
        )
        listener = Listener(
            on_start=self._start,
            on_end=self._end,
            on_stopping=self._other_stopping,
            on_wait=say,
            on_failure=self._suspect,
        )
        times = (self._limits.rendezvous_timeout_secs, float(self._limits.heartbeat_timeout_secs))
        if card.rank != 0:
            self._meeting = Guest(
                self._reactor, card, placement.host, placement.port, listener, *times
            )
        else:
            address = own_address(placement.host)
            number = next_attempt(self._plan.local_dir)
            try:
                self._meeting = Host(
                    self._reactor, card, placement.port, address, number, listener, *times
                )
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                by_hand = placement.cluster == "by hand"
                knob = "--coordinator_address" if by_hand else "PODLIFT_COORDINATOR_ADDRESS"
                raise UserError(
                    f"port {placement.port} of {card.host}, where the ranks are to meet, is taken",
                    f"by another job, or by another rank 0 of this one? {knob}=HOST:PORT, the same "
                    "for all ranks, names another port",
                ) from error
        self._meeting.open()

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
                    config=plan.config,
                    attempt=start.attempt,
                    parent=os.getpid(),
                )
                environ = {
                    **self._environ,
                    **worker.environ,
                    "PODLIFT_ATTEMPT": str(start.attempt),
                }
                label = f"rank {worker.rank} of {plan.num_processes}, {plan.workdir}"
                child = Child(assignment, environ, label=label)
                self._children.append(child)
                self._files[child.rank] = RankFile(plan.local_dir, start.attempt, child.rank)
        for child in self._children:
            child.listen(
                self._reactor,
                functools.partial(self._relay, child),
                functools.partial(self._heard, child),
            )
        self._later(self._watchdog.period, self._watch)

    def _later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls back unless the attempt is over by then."""
        self._timers.append(self._reactor.call_in(seconds, callback))

    # What happens meanwhile

    def _relay(self, child: Child, line: str, is_error: bool) -> None:
        self._files[child.rank].write(line)
        shown = self._plan.shown_ranks
        if self._is_closing or (shown is not None and child.rank not in shown):
            return
        if any(noise in line for noise in _NOISE):
            return
        prefix = f"[{child.rank}] " if shown is None or len(shown) > 1 else ""
        show(line, is_error=is_error, prefix=prefix)

    def _heard(self, child: Child, outcome: Outcome) -> None:
        """A worker has said how it ended."""
        if outcome.is_failure:
            log = self._files[child.rank]
            log.write(f"{outcome.trace}error: {outcome.message}")
            self._failed(of_outcome(outcome, child.rank, str(log.path)))
        else:
            self._later(_EXIT_SECS, child.kill)

    def reap(self) -> None:
        """To be called after SIGCHLD."""
        for child in self._children:
            if child.process.poll() is not None and child.rank not in self._judged:
                self._judged.add(child.rank)
                # Its last words may still be in the pipes.
                self._later(0.05, functools.partial(self._judge, child))

    def _judge(self, child: Child) -> None:
        """A worker is gone."""
        returncode = child.process.returncode
        if child.outcome is None and self._asked_to_stop and returncode == -signal.SIGTERM:
            # It had not even begun to listen.
            child.outcome = Outcome(exit_codes.RETRY, "asked to stop before the first step")
        if child.outcome is None:
            log = self._files[child.rank]
            oom = out_of_memory_kills() > self._oom_kills
            step = child.page.read().step
            self._failed(of_exit(returncode, child.rank, step, str(log.path), log.tail, oom))
        elif all(c.process.poll() is not None and c.outcome is not None for c in self._children):
            outcomes = [c.outcome for c in self._children if c.outcome is not None]
            if not any(outcome.is_failure for outcome in outcomes):
                self._all_ended_well(outcomes)

    def _all_ended_well(self, outcomes: list[Outcome]) -> None:
        code = max(outcome.exit_code for outcome in outcomes)
        message = next((o.message for o in outcomes if o.exit_code == code), "")
        ending = Ending(code, message, None, self._asked_to_stop, self._number)

        # All launchers leave together: a scheduler that sees one go ends the others soon after.
        deadline = self._reactor.clock() + _EXIT_SECS
        if self._meeting is not None:
            self._meeting.done()

        def wait() -> None:
            is_over = self._meeting is None or self._meeting.all_done
            if is_over or self._reactor.clock() > deadline:
                self._ending = self._ending or ending
            else:
                self._later(0.05, wait)

        wait()

    # Failure: one is the story

    def _failed(self, failure: Failure) -> None:
        """A worker of this launcher has failed."""
        if isinstance(self._meeting, Guest):
            self._meeting.failed(failure)
            # The host decides; unless it cannot.
            self._later(3.0, lambda: self._end(failure))
        else:
            self._suspect(failure)

    def _suspect(self, failure: Failure) -> None:
        self._suspects.append(failure)
        if len(self._suspects) == 1:
            self._later(_SETTLE_SECS, self._decide)

    def _decide(self, patient: bool = True) -> None:
        failure = first(self._suspects)
        if patient and failure.weight == CONSEQUENCE:  # the cause is still to come
            self._later(_SETTLE_CONSEQUENCE_SECS, lambda: self._decide(patient=False))
            return
        if isinstance(self._meeting, Host):
            self._meeting.end(failure)
        self._end(failure)

    def _end(self, failure: Failure) -> None:
        """Ends the attempt with a failure."""
        if self._is_closing or self._ending is not None:
            return
        self._is_closing = True
        if failure.wants_stacks:
            for child in self._children:
                child.signal(STACKS_SIGNAL)

        def close() -> None:
            for child in self._children:
                child.kill()
            self._ending = Ending(failure.exit_code, "", failure, self._asked_to_stop, self._number)

        self._later(_STACKS_SECS if failure.wants_stacks else 0.0, close)

    def _watch(self) -> None:
        """Looks whether the workers move on."""
        said = {c.rank: c.page.read() for c in self._children if c.outcome is None}
        stuck = self._watchdog.look(said, self._reactor.clock())
        if stuck is None:
            self._later(self._watchdog.period, self._watch)
            return
        pid = next(child.pid for child in self._children if child.rank == stuck.rank)
        suspended = ", and is suspended (SIGSTOP)" if is_suspended(pid) else ""
        self._failed(
            Failure(
                stuck.rank,
                exit_codes.RETRY,
                f"rank {stuck.rank} has made no progress for {stuck.seconds:.0f} s, at step "
                f"{stuck.progress.step} ({stuck.progress.phase}){suspended}\n  HINT: the stacks of "
                "all ranks are in their logs; if it is only slow, raise --hang_timeout_secs",
                step=stuck.progress.step,
                log=str(self._files[stuck.rank].path),
                wants_stacks=True,
            )
        )

    def dump_stacks(self) -> None:
        """Writes the stacks of all workers into their logs; they go on."""
        for child in self._children:
            child.signal(STACKS_SIGNAL)

    # Being asked to stop

    def stop(self, signal_name: str) -> None:
        """Asks all ranks to save and to stop."""
        if self._asked_to_stop:
            return
        self._asked_to_stop = True
        ranks = ", ".join(str(worker.rank) for worker in self._plan.workers)
        line = f"{signal_name} to the launcher of rank {ranks} on {host_name()}"
        if self._meeting is not None:
            self._meeting.stopping(f"{line}: all ranks save and stop")
        if not self._children:
            rank = self._plan.workers[0].rank
            self._end(Failure(rank, exit_codes.RETRY, f"{line}, before all ranks were there"))
            return
        for child in self._children:
            child.signal(signal.SIGTERM)
        self._later(self._limits.grace_secs, self._grace_is_over)

    def kill(self) -> None:
        """Ends everything at once, for a person who does not want to wait."""
        self._is_closing = True
        for child in self._children:
            child.kill()
        code = 128 + signal.SIGINT
        self._ending = Ending(code, "stopped at once; not saved", None, True, self._number)

    def _other_stopping(self, line: str) -> None:
        """Another launcher was asked to stop; jax lets the workers know."""
        say(line)
        if not self._asked_to_stop:
            self._asked_to_stop = True
            self._later(self._limits.grace_secs, self._grace_is_over)

    def _grace_is_over(self) -> None:
        late = [child for child in self._children if child.process.poll() is None]
        if not late or self._is_closing:
            return
        progress = late[0].page.read()
        failure = Failure(
            late[0].rank,
            exit_codes.RETRY,
            f"rank {late[0].rank} has not stopped within {self._limits.grace_secs:g} s (step "
            f"{progress.step}, {progress.phase}), and was killed\n"
            "  HINT: --grace_secs waits longer",
            step=progress.step,
            log=str(self._files[late[0].rank].path),
            wants_stacks=True,
        )
        self._failed(failure)

    # The end

    def _bury(self) -> None:
        """Leaves no process, no open file and no connection behind."""
        for child in self._children:
            child.kill()
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):  # in the kernel's hands
                child.process.wait(timeout=5)
        kill_orphans(child.pid for child in self._children if child.process.poll() is None)
        for timer in self._timers:
            timer.cancel()
        is_over: list[bool] = []
        self._reactor.call_in(0.05, lambda: is_over.append(True))
        self._reactor.run(lambda: bool(is_over))  # what is left in the pipes
        if self._held_port is not None:
            self._held_port.close()
        if self._meeting is not None:
            self._meeting.leave()
        for child in self._children:
            child.close(self._reactor)
        for file in self._files.values():
            file.close()
        if self._ending is not None and self._ending.exit_code == exit_codes.USAGE:
            remove_logs(self._plan.local_dir, self._number)
