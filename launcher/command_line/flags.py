"""The flags of a training run. Nothing here imports jax, so typos are answered at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from launcher.command_line.parse import Flags, read_command
from launcher.command_line.variants import chosen_run
from trainer.config.config_json import plain_data
from trainer.config.keys import flatten
from trainer.errors import UserError


@dataclass(frozen=True)
class Options:
    """The parsed command line of a training run.

    Attributes:
        config: the resolved config, locked.
        workdir: the run's folder.
        has_workdir: whether the command line names the workdir; else it is the default.
        fake_devices: number of CPU devices to fake in each process; None for real devices.
        processes: number of processes on this machine; None if not given.
        cluster: "auto", "none", or the name of a cluster.
        coordinator_address: `HOST:PORT` of rank 0; given together with the next two.
        num_processes: number of processes in the job.
        process_id: rank of this process.
        max_restarts: how many times to restart.
        hang_timeout_secs: longest time without progress; None for the default.
        grace_secs: time from a request to stop to a kill.
        rendezvous_timeout_secs: time for all processes to join.
        heartbeat_timeout_secs: silence after which a host counts as lost.
        shutdown_timeout_secs: time for all processes to leave.
        log_ranks: the ranks whose output is shown.
        local_dir: where local files go if the workdir is remote; None for the system's temporary
            folder.
        profile: steps to trace, as `START:STEPS`; None for none.
        dry_run: only print the launch spec.
        print_config: only print the config.
        smoke: only check that the run would work.
        sweep: run every variant of the sweep; the workdir is the sweep's.
        sweep_index: the variant to run, if this is one of a sweep; the workdir is the run's.
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


# Flags other than --config and --help.
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


def parse(argv: Sequence[str], now: float | None = None, commands: Sequence[str] = ()) -> Options:
    """Parses a command line.

    Args:
        argv: the program's name and its arguments.
        now: seconds since the epoch, for the default workdir.
        commands: names that a mistyped argument may have meant.

    Raises:
        UserError: a flag, its value or the config file is wrong.
    """
    chosen = chosen_run(argv)
    change = chosen.apply if chosen else None
    command = read_command(argv, _FLAGS, change=change, commands=commands)
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
    """Every key as `key = value`, sorted, one per line."""
    flat = {key: value for key, value in flatten(config).items() if value != ConfigDict()}
    # The text of a ConfigDict in a list has several lines.
    flat |= {
        key: plain_data(value) for key, value in flat.items() if isinstance(value, (list, tuple))
    }
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
