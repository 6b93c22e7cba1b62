"""One process of a run: from options to an exit code."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback

from launcher import environment, exit_codes
from launcher.flags import Options
from launcher.rank_log import RankLog, local_folder
from launcher.signals import StopRequest
from trainer import workdir as workdir_lib
from trainer.console import open_terminal
from trainer.errors import (
    CheckpointsUnreadable,
    NonFiniteLoss,
    Preempted,
    ReplicasDiffer,
    UserError,
)
from trainer.settings import check


def run(options: Options) -> int:
    """Trains in this process; returns the exit code.

    Everything that can be refused without jax is refused before it is imported.
    """
    stop_requested = StopRequest()
    stop_requested.install()
    open_terminal()
    rank_log = RankLog(options.workdir)
    for name in ("podlift", "py.warnings"):
        logging.getLogger(name).addHandler(rank_log)
    try:
        settings = check(options.config)
        workdir_lib.Workdir.check(options.workdir, settings.config)
        environment.prepare(os.environ, options.fake_devices)

        from launcher.mesh import build_mesh
        from trainer.loop import train

        mesh = build_mesh(settings.lift)
        train(options.config, options.workdir, mesh, stop_requested=stop_requested)
    except UserError as error:
        _report(f"error: {error}")
        return exit_codes.USAGE
    except Preempted as error:
        (local_folder(options.workdir) / "failure.json").unlink(missing_ok=True)
        _report(f"{error}\n  HINT: the same command with --workdir={options.workdir} goes on")
        return exit_codes.RETRY
    except Exception as error:
        return _failed(error, options.workdir, rank_log)
    (local_folder(options.workdir) / "failure.json").unlink(missing_ok=True)
    return exit_codes.DONE


def _failed(error: Exception, workdir: str, rank_log: RankLog) -> int:
    if isinstance(error, NonFiniteLoss):
        message = (
            f"{error}\n  HINT: lower config.optimizer.learning_rate, in a new --workdir, or look "
            "at the data of that step; no state that is not finite was saved"
        )
        trace = ""
    elif isinstance(error, (CheckpointsUnreadable, ReplicasDiffer)):
        message, trace = str(error), ""
    else:
        message = f"{type(error).__name__} on rank 0: {error}"
        trace = traceback.format_exc()
    path = rank_log.open()
    _report(f"{trace}error: {message}\n  full log: {path}")
    failure = {
        "rank": 0,
        "exit_code": exit_codes.FAILED,
        "error": message,
        "step": getattr(error, "step", None),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "log": str(path),
    }
    target = local_folder(workdir) / "failure.json"
    target.write_text(json.dumps(failure, indent=2) + "\n")
    return exit_codes.FAILED


def _report(text: str) -> None:
    logging.getLogger("podlift").error("%s", text)
    sys.stdout.flush()
