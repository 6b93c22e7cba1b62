"""One process of a run: in place, or as a worker under a supervisor."""

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
from launcher.processes import user_errors
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
    FolderMoved,
    NonFiniteLoss,
    NonFiniteState,
    PeerFailed,
    Preempted,
    ReplicasDiffer,
    SavesFailed,
    SmokeFailed,
    StateUnreadable,
    StorageFailed,
    UserError,
    text_of,
)
from trainer.workdir.paths import absolute
from trainer.workdir.workdir import Workdir


def run_here(spec: LaunchSpec) -> int:
    """Trains in this process, the only one of the job; returns the exit code."""
    workdir, local_dir = spec.workdir, spec.local_dir
    rank_log = RankLog(workdir, local_dir)
    stop_requested = StopRequest(rank_log.write_from_handler)
    stop_requested.install()
    os.register_at_fork(after_in_child=reset_signals)
    _show_stacks()
    open_terminal()
    for name in ("podlift", "py.warnings"):
        logging.getLogger(name).addHandler(rank_log)

    def train() -> None:
        os.environ.update(spec.workers[0].environ)
        _train(
            spec.settings.config,
            workdir,
            spec.local_base,
            stop_requested,
            spec.profile,
            resumes=spec.folder.exists,
            smoke=spec.smoke,
        )

    outcome = _outcome_of(train, rank=0)
    if outcome.is_failure and outcome.exit_code != exit_codes.USAGE:
        try:
            path = str(rank_log.open())
        except (OSError, UserError) as error:
            path = f"cannot be written ({error})"
        text = f"{outcome.trace}error: {outcome.message}\n  full log: {path}"
        if rank_log.is_moved:  # the folder at that path is not this run's
            _log_error(text)
            return outcome.exit_code
        in_memory = spec.settings.fast_every_secs > 0
        hint = how_to_resume(workdir, smoke=spec.smoke, in_memory=in_memory)
        _log_error(f"{text}\n  {hint}")
        with contextlib.suppress(OSError):
            write_failure(local_dir, outcome, rank=0, log=path, attempt=rank_log.attempt)
        return outcome.exit_code
    if outcome.exit_code == exit_codes.USAGE:
        _log_error(f"error: {outcome.message}")
        return outcome.exit_code
    if outcome.message:
        _log_error(f"{outcome.message}\n  {how_to_resume(workdir, smoke=spec.smoke)}")
    with contextlib.suppress(OSError):
        clear_failure(local_dir)
    return outcome.exit_code


def main() -> None:
    """The entry point of a worker under a launcher; see `launcher.processes.assignment`.

    The outcome goes to the launcher, which decides on the root cause. Nothing is printed here.
    """
    pid = os.getpid()
    stop_requested = StopRequest()
    stop_requested.install()
    os.register_at_fork(after_in_child=reset_signals)
    _show_stacks()
    # The launcher has blocked these, so that none of them arrives before its handler is set.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, STACKS_SIGNAL})
    assigned, page_file, outcome_file = (int(text) for text in sys.argv[1].split(","))
    assignment = Assignment.read(assigned)
    page = ProgressPage(page_file)
    has_peers = assignment.coordinator is not None
    _die_with(assignment.parent)
    open_terminal()
    if "" not in sys.path:
        sys.path.insert(0, "")

    def train() -> None:
        from launcher.worker.join import join

        page.write(0, "start")
        join(assignment)
        if has_peers:
            forward_to_jax(stop_requested)
        _train(
            config_from_json(assignment.config),
            assignment.workdir,
            assignment.local_dir,
            with_progress(SyncPoint() if has_peers else stop_requested, page.write),
            assignment.profile,
            resumes=assignment.resumes,
            smoke=assignment.smoke,
        )

    outcome = _outcome_of(train, assignment.rank, lambda: page.read().step, has_peers=has_peers)
    if os.getpid() != pid:  # a forked child of user code that returned instead of exiting
        os._exit(1)
    with os.fdopen(outcome_file, "wb", closefd=True) as pipe:
        pipe.write(outcome.to_line())
    if outcome.is_failure:
        # Peers fail as soon as this process closes its connections, and their outcomes must not
        # arrive before this one. The launcher kills all of them first.
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
    resumes: bool,
    smoke: bool,
) -> None:
    folder = Workdir(absolute(workdir), config, exists=resumes)
    if resumes and not smoke and not folder.is_recorded(patience=10.0):
        raise FolderMoved(
            f"{workdir} held a run when this job began, and holds none now: it was renamed or "
            "removed meanwhile"
        )
    from launcher.worker import exchange
    from launcher.worker.connect import connect
    from launcher.worker.mesh import build_mesh

    mesh = build_mesh(config.get("lift", "pmap"), config.get("devices_per_process"))
    connect(mesh)
    exchange.use_where_it_pays()
    if smoke:
        from trainer.run.smoke import smoke as run_smoke_test

        run_smoke_test(config, workdir, mesh, stop_requested=stop_requested, local_dir=local_dir)
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
    """Runs `train`, and turns whatever it raises into an outcome."""
    try:
        train()
    except UserError as error:
        return Outcome(exit_codes.USAGE, text_of(error))
    except Preempted as error:
        return Outcome(exit_codes.RETRY, str(error), step=error.step)
    except NonFiniteLoss as error:
        hint = (
            "look at the data of that step, lower config.optimizer.learning_rate (on the same run "
            "with --config.checkpoint.allow=optimizer), or skip such updates with "
            "--config.nan=skip"
        )
        return Outcome(exit_codes.FAILED, f"{error}\n  HINT: {hint}", step=error.step)
    except StorageFailed as error:
        return Outcome(exit_codes.RETRY, str(error), step=step(), failed=True)
    except (
        FolderMoved,
        NonFiniteState,
        ReplicasDiffer,
        SavesFailed,
        SmokeFailed,
        StateUnreadable,
    ) as error:
        return Outcome(exit_codes.FAILED, str(error), step=step())
    except PeerFailed as error:
        return Outcome(exit_codes.FAILED, str(error), step=step(), lost_peer=True)
    except BaseException as error:  # also SystemExit: sys.exit(0) in user code is no success
        trace, cause = traceback.format_exc(), user_errors.cause_of(error)
        message = f"{type(cause).__name__} on rank {rank}: {user_errors.message_of(cause)}"
        # An OSError is from the user's code: jax has its own types for a lost peer.
        may_be_lost = has_peers and not isinstance(error, OSError) and user_errors.is_of_jax(error)
        lost_peer = may_be_lost and is_lost_peer_error(text_of(error))
        return Outcome(exit_codes.FAILED, message, trace, step(), lost_peer)
    return Outcome(exit_codes.DONE)


def _show_stacks() -> None:
    """Writes stacks to stderr: after a crash in native code, and of all threads on request."""
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)


def _die_with(parent: int) -> None:
    """Ends this process when its launcher is gone, also after SIGKILL."""
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


def _log_error(text: str) -> None:
    logging.getLogger("podlift").error("%s", text)
