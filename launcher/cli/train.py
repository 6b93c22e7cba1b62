"""`python -m launcher --config=FILE`: trains. Help and typos answer before jax is imported."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging

from launcher import exit_codes
from launcher.cli.commands import COMMANDS, NAMES
from launcher.cli.run_command import asks_for_help
from launcher.command_line import flags
from launcher.command_line.flags import Options
from trainer.console import OutputLost, complain, open_terminal, show
from trainer.errors import StorageFailed, UserError

if TYPE_CHECKING:
    from launcher.launch.spec import LaunchSpec

_OTHER_COMMANDS = "".join(
    f"  python -m launcher {command.name:9} {command.summary}\n" for command in COMMANDS[1:]
)

HELP = f"""\
Trains a Flax model written for one chip on all devices of this machine or cluster.

  python -m launcher --config=configs/mlp.py [--config.KEY=VALUE ...] [flags]

  --config=FILE[:ARG]    a file that defines get_config(); ARG is passed to it
  --config.KEY=VALUE     overrides one key, for example --config.optimizer.learning_rate=0.1;
                         --config.model.sizes[0]=64 one item of a list
  --flagfile=FILE        reads flags, --config among them, from FILE, one a line; for any command
  --workdir=DIR          the run's folder; a run in the same folder resumes from its last checkpoint
                         (default: a new runs/<config>-<time>)
  --profile=START:STEPS  traces the STEPS steps after the first START, into WORKDIR/plugins/profile
  --print_config         prints every key with its value and exits
  --dry_run              prints the processes, their environment and the mesh, and exits
  --smoke                takes two steps, evaluates, saves, restores, reports whether all of that
                         works, and leaves nothing behind
  --sweep                runs every variant that get_sweep() of FILE yields, one after the other,
                         each in a subfolder of the workdir, and prints a table of the results
  --sweep_index=I        runs only variant I, counted from 0 (for job arrays)
  --help                 prints this text

Where it runs:
  --processes=N          N processes on this machine, which share its GPUs
  --fake_devices=M       M virtual CPU devices in each process
  --cluster=auto         what started this process: auto, none (this machine only), slurm,
                         open_mpi, torchrun, kubernetes, tpu_gke or another name of the table in
                         docs/clusters.md; each task, pod or host runs the same command
  --coordinator_address=HOST:PORT --num_processes=N --process_id=R
                         the same by hand: one command for each process, R from 0 to N-1

What happens on a failure:
  --max_restarts=0       how many times to restart from the newest checkpoint (on one machine)
  --hang_timeout_secs=600
                         a process that trains without progress for this long ends the job, with
                         the stacks of all processes in their logs; ten times this to compile, save
                         or evaluate
  --grace_secs=300       from a request to stop until processes are killed
  --rendezvous_timeout_secs=300
                         for all processes to join the rendezvous
  --heartbeat_timeout_secs=10
                         without a heartbeat from another host until it counts as lost
  --shutdown_timeout_secs=15
                         for all processes to leave at the end
  --log_ranks=0          whose output is shown: 0, all, or 1,3; WORKDIR/logs holds all output
  --local_dir=DIR        for logs and locks if the workdir is remote

Other commands, each with its own --help:
{_OTHER_COMMANDS}
Exit codes: 0 done, 1 the program failed, 2 usage, 42 start it again (stopped on request after a
save, killed from outside, a host lost, no progress).
"""


def main(argv: Sequence[str]) -> int:
    """Parses the flags of a run, and trains; exits rather than returns.

    Args:
        argv: the arguments after the program's name.
    """
    app.run(lambda options: run(options, argv), [sys.argv[0], *argv], flags_parser=_parse_or_exit)
    raise AssertionError("absl's app.run has not exited")


def run(options: Options, argv: Sequence[str]) -> int:
    """Trains, in this process or in processes of its own; returns the exit code.

    Args:
        options: the parsed command line.
        argv: its arguments.
    """
    from launcher.launch import smoke
    from launcher.launch.build import make_launch_spec
    from launcher.launch.dry_run import describe_launch
    from trainer.workdir import lock

    open_terminal()
    try:
        if options.sweep:
            from launcher.sweep.sweep import run_sweep

            return run_sweep(options, argv, os.environ)
        spec = make_launch_spec(options, os.environ)
        if spec.folder.refused:
            _refuse_changes(spec)
        if options.smoke:
            spec = smoke.smoke_spec(spec)
        if options.dry_run:
            show(describe_launch(spec, os.environ), end="")
            return exit_codes.DONE
        lock.check_free(spec.folder.path, spec.local_base)
        smoke_folder = smoke.SmokeFolder(spec)
        code = _start(spec)
    except StorageFailed as error:
        complain(f"error: {error}")
        return exit_codes.RETRY
    except UserError as error:
        complain(f"error: {error}")
        return exit_codes.USAGE
    except OutputLost as error:
        complain(f"error: {error.strerror}")
        return exit_codes.FAILED
    return smoke_folder.report(code) if options.smoke else code


def _parse_or_exit(argv: Sequence[str]) -> Options:
    """`flags.parse` for `absl.app.run`. Prints help and errors itself: absl would exit with 1."""
    absl_flags.FLAGS(argv[:1])  # absl's own flags, which app.run reads
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs its every action as info
    try:
        if asks_for_help(argv[1:]):
            show(HELP, end="")
            sys.exit(exit_codes.DONE)
        options = flags.parse(argv, commands=NAMES)
        if options.print_config:
            show(flags.format_config(options.config), end="")
            sys.exit(exit_codes.DONE)
    except UserError as error:
        complain(f"error: {error}")
        sys.exit(exit_codes.USAGE)
    except OutputLost as error:
        complain(f"error: {error.strerror}")
        sys.exit(exit_codes.FAILED)
    return options


def _start(spec: LaunchSpec) -> int:
    from trainer.workdir.paths import make_local_base

    with contextlib.suppress(OSError):  # training does not fail because its logs cannot be written
        make_local_base(spec.workdir, spec.local_base)
    if spec.supervised:
        from launcher.supervisor.supervise import supervise

        return supervise(spec)
    from launcher.worker.run import run_here

    return run_here(spec)


def _refuse_changes(spec: LaunchSpec) -> None:
    """Raises the UserError for a config that differs from that of the run in the workdir.

    Nothing will start, so this process may import jax to find out what the state would be. With
    several launchers, only that of rank 0 does so, on its CPU.
    """
    if spec.placement is None or spec.placement.process_id == 0:
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            from trainer.run.ownership import refuse_changes
            from trainer.step.job import build_job

            refuse_changes(spec.settings, spec.folder, build_job(spec.settings))
        except UserError as error:
            if "another config" in error.message:
                raise
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: S110 (of the user's code; the line below names the config)
            pass
    spec.folder.refuse_changes()
