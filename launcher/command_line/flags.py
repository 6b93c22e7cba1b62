"""The command line. Nothing here imports jax, so help and typos answer at once."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from launcher import exit_codes
from launcher.command_line.parse import Flags, read_command
from launcher.command_line.variants import chosen_run
from trainer.config.keys import flatten
from trainer.errors import UserError

HELP = """\
Trains a Flax model written for one chip on all devices of this machine or cluster.

  python -m launcher --config=configs/mlp.py [--config.KEY=VALUE ...] [flags]

  --config=FILE[:ARG]    a file with get_config(), called with ARG where one is given
  --config.KEY=VALUE     changes one key of it, for example --config.optimizer.learning_rate=0.1
  --workdir=DIR          the run's folder; the same folder again goes on from its last checkpoint
                         (default: a new runs/<config>-<time>)
  --profile=START:STEPS  traces the STEPS steps after the first START, into WORKDIR/plugins/profile
  --print_config         shows every key with its value, and exits
  --dry_run              shows the processes, their environment and the mesh, and exits
  --smoke                takes two steps, evaluates, saves and restores, says whether all is well,
                         and leaves nothing behind
  --sweep                one run after the other for what get_sweep() of FILE yields, each in a
                         folder of its own in the workdir, and a table of them
  --sweep_index=I        only run I of them, from 0 (for an array of jobs)
  --help                 this text

Where it runs:
  --processes=N          N processes on this machine, which share its GPUs
  --fake_devices=M       M virtual CPU devices in each process
  --cluster=auto         what has started this process: auto, none (this machine only), slurm,
                         open_mpi, kubernetes, tpu_gke or tpu_gce; each task, pod or host runs the
                         same command
  --coordinator_address=HOST:PORT --num_processes=N --process_id=R
                         the same by hand: one command a process, R from 0 to N-1

What happens when something fails:
  --max_restarts=0       how often to start again from the newest checkpoint (on one machine)
  --hang_timeout_secs=600
                         a process that trains without progress for so long ends the job, with the
                         stacks of all in their logs; ten times that to compile, save or evaluate
  --grace_secs=300       after being asked to stop, until processes are killed
  --rendezvous_timeout_secs=300
                         for all processes to come together
  --heartbeat_timeout_secs=10
                         without a sign of life from another host, until it counts as lost
  --shutdown_timeout_secs=15
                         for all processes to leave at the end
  --log_ranks=0          whose output is shown: 0, all, or 1,3; all of it is in WORKDIR/logs
  --local_dir=DIR        for logs and locks if the workdir is remote

Also, each with a --help of its own:
  python -m launcher eval      a saved state on the held-out data, on any devices
  python -m launcher predict   the model's outputs for a data set, as a file
  python -m launcher export    the trained model as a file that needs jax only
  python -m launcher report    runs as one page of HTML: curves, config, faults
  python -m launcher plan      does it fit a TPU or GPU topology, how fast: without one
  python -m launcher env       versions, devices and variables, for a bug report (no --help)

Exit codes: 0 done, 1 the program failed, 2 usage, 42 start it again (asked to stop and saved,
killed from outside, a host lost, no progress).
"""


@dataclass(frozen=True)
class Options:
    """A parsed command line.

    Attributes:
        config: the resolved config, locked.
        workdir: the run's folder.
        has_workdir: whether it was given, or is the default.
        fake_devices: how many CPU devices to fake in each process; None for real devices.
        processes: how many on this machine; None if nothing was said.
        cluster: "auto", "none", or the name of one.
        coordinator_address: `HOST:PORT` of rank 0, given by hand with the next two.
        num_processes: in the job.
        process_id: of this one.
        max_restarts: how often to start again.
        hang_timeout_secs: without progress; None for the default.
        grace_secs: from a request to stop to a kill.
        rendezvous_timeout_secs: for all processes to come together.
        heartbeat_timeout_secs: of silence, until a host is lost.
        shutdown_timeout_secs: for all processes to leave together.
        log_ranks: whose output is shown.
        local_dir: for what needs a local folder; None for the system's temporary one.
        profile: which steps to trace, as `START:STEPS`; None: none.
        dry_run: only show the plan.
        print_config: only show the config.
        smoke: only try whether the run would work.
        sweep: start every run of the config's sweep; the workdir is the sweep's.
        sweep_index: which run of the sweep this is, if it is one; the workdir is the run's.
    """

    config: ConfigDict
    workdir: str
    has_workdir: bool
    fake_devices: int | None
    processes: int | None
    cluster: str
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    max_restarts: int
    hang_timeout_secs: float | None
    grace_secs: float
    rendezvous_timeout_secs: float
    heartbeat_timeout_secs: int
    shutdown_timeout_secs: int
    log_ranks: str
    local_dir: str | None
    profile: str | None
    dry_run: bool
    print_config: bool
    smoke: bool
    sweep: bool
    sweep_index: int | None


# Those beside --config and --help.
_FLAGS: Flags = {
    "workdir": (flags.DEFINE_string, None, None),
    "print_config": (flags.DEFINE_bool, False, None),
    "dry_run": (flags.DEFINE_bool, False, None),
    "smoke": (flags.DEFINE_bool, False, None),
    "sweep": (flags.DEFINE_bool, False, None),
    "sweep_index": (flags.DEFINE_integer, None, 0),
    "processes": (flags.DEFINE_integer, None, 1),
    "fake_devices": (flags.DEFINE_integer, None, 1),
    "cluster": (flags.DEFINE_string, "auto", None),
    "coordinator_address": (flags.DEFINE_string, None, None),
    "num_processes": (flags.DEFINE_integer, None, 1),
    "process_id": (flags.DEFINE_integer, None, 0),
    "max_restarts": (flags.DEFINE_integer, 0, 0),
    "hang_timeout_secs": (flags.DEFINE_float, None, 0.1),
    "grace_secs": (flags.DEFINE_float, 300.0, 0.0),
    "rendezvous_timeout_secs": (flags.DEFINE_float, 300.0, 0.1),
    "heartbeat_timeout_secs": (flags.DEFINE_integer, 10, 2),
    "shutdown_timeout_secs": (flags.DEFINE_integer, 15, 1),
    "log_ranks": (flags.DEFINE_string, "0", None),
    "local_dir": (flags.DEFINE_string, None, None),
    "profile": (flags.DEFINE_string, None, None),
}


def parse_or_exit(argv: Sequence[str]) -> Options:
    """`parse`, for `absl.app.run(flags_parser=...)`: handles help and reports errors itself."""
    flags.FLAGS(argv[:1])  # absl's own flags, which app.run reads
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax reports its every move as info
    try:
        if any(re.fullmatch(r"--?(help|helpshort|helpfull|h)", arg) for arg in argv[1:]):
            print(HELP, end="")
            sys.exit(exit_codes.DONE)
        options = parse(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(exit_codes.USAGE)
    if options.print_config:
        print(format_config(options.config), end="")
        sys.exit(exit_codes.DONE)
    return options


def parse(argv: Sequence[str], now: float | None = None) -> Options:
    """Parses a command line.

    Args:
        argv: the program's name and its arguments.
        now: seconds since the epoch, for the default workdir.

    Raises:
        UserError: for anything a person got wrong.
    """
    chosen = chosen_run(argv)
    command = read_command(argv, _FLAGS, change=chosen.apply if chosen else None)
    given = command.flags
    has_workdir = given["workdir"] is not None
    if not has_workdir:
        now = time.time() if now is None else now
        given["workdir"] = _default_workdir(command.path, command.spec, now)
    if given["sweep"] and (given["smoke"] or chosen):
        other = "--sweep_index" if chosen else "--smoke"
        raise UserError(
            f"--sweep and {other} exclude each other", "--sweep_index=I is one run of the sweep"
        )
    if chosen:
        given["workdir"] = chosen.folder(given["workdir"])
    return Options(config=command.config.lock(), has_workdir=has_workdir, **given)


def format_config(config: ConfigDict) -> str:
    """Every key as `key = value`, sorted, one a line."""
    flat = {key: value for key, value in flatten(config).items() if value != ConfigDict()}
    width = max(map(len, flat))
    return "".join(f"{key:{width}} = {flat[key]!r}\n" for key in sorted(flat))


def _default_workdir(path: Path, spec: str, now: float) -> str:
    argument = spec.partition(":")[2]
    parts = [path.stem]
    if re.fullmatch(r"\w+", argument):
        parts.append(argument)
    parts.append(time.strftime("%Y%m%d-%H%M%S", time.localtime(now)))
    workdir = unused = os.path.join("runs", "-".join(parts))
    count = 1
    while os.path.exists(unused):
        count += 1
        unused = f"{workdir}-{count}"
    return unused
