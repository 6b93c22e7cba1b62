"""`python -m launcher` and the command `podlift`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.command_line.flags import Options
    from launcher.launch.spec import LaunchSpec


def main() -> None:
    """The entry point; exits with the codes of `launcher.exit_codes`."""
    # A user's own package is named by import path, from the folder the command is run in. `python
    # -m` puts that folder first already; the installed command does not.
    if "" not in sys.path:
        sys.path.insert(0, "")
    arguments = sys.argv[2:]
    match sys.argv[1:2]:
        case ["env"]:
            from launcher.cli.env import print_environment

            sys.exit(print_environment())
        case ["eval"]:
            from launcher.cli.evaluate import main as evaluate

            sys.exit(evaluate(arguments))
        case ["export"]:
            from launcher.cli.export import main as export

            sys.exit(export(arguments))
        case ["plan"]:
            from launcher.cli.plan import main as plan

            sys.exit(plan(arguments))
        case ["predict"]:
            from launcher.cli.predict import main as predict

            sys.exit(predict(arguments))
        case ["report"]:
            from launcher.cli.report import main as report

            sys.exit(report(arguments))
    from absl import app

    from launcher.command_line import flags

    app.run(run, flags_parser=flags.parse_or_exit)


def run(options: Options) -> int:
    """Plans a run and runs it, in place or in processes of its own; returns the exit code."""
    from launcher import exit_codes
    from launcher.launch import smoke
    from launcher.launch.build import make_launch_spec
    from launcher.launch.dry_run import describe_launch
    from trainer.console import open_terminal
    from trainer.errors import UserError
    from trainer.workdir import lock

    open_terminal()
    try:
        if options.sweep:
            from launcher.sweep.sweep import run_sweep

            return run_sweep(options, sys.argv[1:], os.environ)
        planned = make_launch_spec(options, os.environ)
        if planned.folder.refused:
            _refuse_changes(planned)
        if options.smoke:
            planned = smoke.smoke_spec(planned)
        if options.dry_run:
            print(describe_launch(planned, os.environ), end="")
            return exit_codes.DONE
        lock.check_free(planned.folder.path, planned.local_base)
        smoke_folder = smoke.SmokeFolder(planned)
        code = _start(planned)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.USAGE
    return smoke_folder.report(code) if options.smoke else code


def _start(planned: LaunchSpec) -> int:
    """Runs a plan, in place or in processes of its own; returns the exit code."""
    if planned.supervised:
        from launcher.supervisor.supervise import supervise

        return supervise(planned)
    from launcher.worker.run import run_here

    return run_here(planned)


def _refuse_changes(planned: LaunchSpec) -> None:
    """Raises the refusal of a config that is not that of the run in the workdir.

    Nothing will be started, so this process may import jax to find out what the state would be; of
    several launchers one does, on its CPU.
    """
    from trainer.errors import UserError

    if planned.placement is None or planned.placement.process_id == 0:
        os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            from trainer.run.ownership import refuse_changes
            from trainer.step.job import build_job

            refuse_changes(planned.settings, planned.folder, build_job(planned.settings))
        except UserError as error:
            if "another config" in error.message:
                raise
        except Exception:  # noqa: S110 (of the user's code; the config is told all the same)
            pass
    planned.folder.refuse_changes()


if __name__ == "__main__":
    main()
