"""One process of a run: in place, or as one of several under a launcher."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from launcher import exit_codes
from launcher.launch.spec import LaunchSpec
from launcher.processes.assignment import Assignment, Outcome
from launcher.processes.failure import clear_failure, is_lost_peer_error, write_failure
from launcher.processes.messages import how_to_resume
from launcher.processes.progress_page import ProgressPage
from launcher.processes.rank_log import RankLog
from launcher.processes.signals import (
    STACKS_SIGNAL,
    STOP_SIGNALS,
    StopRequest,
    SyncPoint,
    forward_to_jax,
    reset_signals,
    with_progress,
)
from trainer.config.config_json import config_from_json
from trainer.console import open_terminal
from trainer.errors import (
    NonFiniteLoss,
    NonFiniteState,
    PeerFailed,
    Preempted,
    ReplicasDiffer,
    SavesFailed,
    SmokeFailed,
    StateUnreadable,
    UserError,
)


def run_here(plan: LaunchSpec) -> int:
    """Trains in this process, alone; returns the exit code."""
    workdir, local_dir = plan.workdir, plan.local_dir
    rank_log = RankLog(workdir, local_dir)
    stop_requested = StopRequest(rank_log.last_words)
    stop_requested.install()
    os.register_at_fork(after_in_child=reset_signals)
    _show_stacks()
    open_terminal()
    for name in ("podlift", "py.warnings"):
        logging.getLogger(name).addHandler(rank_log)

    def train() -> None:
        os.environ.update(plan.workers[0].environ)
        _train(
            plan.settings.config,
            workdir,
            plan.local_base,
            stop_requested,
            plan.profile,
            smoke=plan.smoke,
        )

    outcome = _outcome_of(train, rank=0)
    if outcome.is_failure and outcome.exit_code != exit_codes.USAGE:
        try:
            path = str(rank_log.open())
        except (OSError, UserError) as error:
            path = f"cannot be written ({error})"
        in_memory = plan.settings.fast_every_secs > 0
        hint = how_to_resume(workdir, smoke=plan.smoke, in_memory=in_memory)
        _report(f"{outcome.trace}error: {outcome.message}\n  full log: {path}\n  {hint}")
        with contextlib.suppress(OSError):
            write_failure(local_dir, outcome, rank=0, log=path, attempt=rank_log.attempt)
        return outcome.exit_code
    if outcome.exit_code == exit_codes.USAGE:
        _report(f"error: {outcome.message}")
        return outcome.exit_code
    if outcome.message:
        _report(f"{outcome.message}\n  {how_to_resume(workdir, smoke=plan.smoke)}")
    with contextlib.suppress(OSError):
        clear_failure(local_dir)
    return outcome.exit_code


def main() -> None:
    """The entry point of a worker under a launcher; see `launcher.processes.assignment`.

    What went wrong is told to the launcher, which decides whose failure is the story; nothing of
    it is printed here.
    """
    me = os.getpid()
    stop_requested = StopRequest()
    stop_requested.install()
    os.register_at_fork(after_in_child=reset_signals)
    _show_stacks()
    # The launcher holds these back until here, so that none of them finds its default.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, STACKS_SIGNAL})
    assigned, page_file, report_file = (int(text) for text in sys.argv[1].split(","))
    assignment = Assignment.read(assigned)
    page = ProgressPage(page_file)
    _die_with(assignment.parent)
    open_terminal()
    if "" not in sys.path:
        sys.path.insert(0, "")

    def train() -> None:
        from launcher.worker.join import join

        page.write(0, "start")
        join(assignment)
        several = assignment.coordinator is not None
        if several:
            forward_to_jax(stop_requested)
        config = config_from_json(assignment.config)
        asked = SyncPoint() if several else stop_requested
        stop = with_progress(asked, page.write)
        _train(
            config,
            assignment.workdir,
            assignment.local_dir,
            stop,
            assignment.profile,
            smoke=assignment.smoke,
        )

    outcome = _outcome_of(
        train,
        assignment.rank,
        lambda: page.read().step,
        has_peers=assignment.coordinator is not None,
    )
    if os.getpid() != me:  # a fork of user code that was not kept from coming back here
        os._exit(1)
    with os.fdopen(report_file, "wb", closefd=True) as report:
        report.write(outcome.to_line())
    if outcome.is_failure:
        # Peers fail as soon as this process lets go of its connections, and what they say must not
        # come before what it has said. The launcher ends them all.
        time.sleep(5)
        os._exit(outcome.exit_code)
    with contextlib.suppress(Exception):
        from launcher.worker.join import leave

        leave()
    sys.exit(outcome.exit_code)


def _train(
    config: ConfigDict,
    workdir: str,
    local_dir: str | None,
    stop_requested: Callable[[int, str], bool],
    profile: str | None,
    *,
    smoke: bool,
) -> None:
    from launcher.worker import exchange
    from launcher.worker.mesh import build_mesh

    mesh = build_mesh(config.get("lift", "pmap"), config.get("devices_per_process"))
    exchange.use_where_it_pays()
    if smoke:
        from trainer.run.smoke import smoke as try_once

        try_once(config, workdir, mesh, stop_requested=stop_requested, local_dir=local_dir)
        return
    from trainer.run.train import train

    train(
        config,
        workdir,
        mesh,
        stop_requested=stop_requested,
        local_dir=local_dir,
        profile=profile,
    )


def _outcome_of(
    train: Callable[[], Any],
    rank: int,
    step: Callable[[], int | None] = lambda: None,
    *,
    has_peers: bool = False,
) -> Outcome:
    """Runs a training; whatever it raises becomes an outcome."""
    try:
        train()
    except UserError as error:
        return Outcome(exit_codes.USAGE, str(error))
    except Preempted as error:
        return Outcome(exit_codes.RETRY, str(error), step=error.step)
    except NonFiniteLoss as error:
        hint = (
            "look at the data of that step, lower config.optimizer.learning_rate (on the same run "
            "with --config.checkpoint.allow=optimizer), or leave such updates out with "
            "--config.nan=skip"
        )
        return Outcome(exit_codes.FAILED, f"{error}\n  HINT: {hint}", step=error.step)
    except (NonFiniteState, ReplicasDiffer, SavesFailed, SmokeFailed, StateUnreadable) as error:
        return Outcome(exit_codes.FAILED, str(error), step=step())
    except PeerFailed as error:
        return Outcome(exit_codes.FAILED, str(error), step=step(), lost_peer=True)
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            text = str(error)
        except Exception:
            text = trace.splitlines()[-1]
        message = f"{type(error).__name__} on rank {rank}: {text}"
        # A network error of the operating system is one of the user's code: jax has its own types.
        lost_peer = has_peers and not isinstance(error, OSError) and is_lost_peer_error(text)
        return Outcome(exit_codes.FAILED, message, trace, step(), lost_peer)
    return Outcome(exit_codes.DONE)


def _show_stacks() -> None:
    """To stderr: of a crash in native code, and of all threads whenever that is asked for."""
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)


def _die_with(parent: int) -> None:
    """Ends this process when its launcher is gone, however that ended."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if sys.platform != "linux" or os.getppid() != parent:
        threading.Thread(target=watch, daemon=True).start()


def _report(text: str) -> None:
    logging.getLogger("podlift").error("%s", text)
