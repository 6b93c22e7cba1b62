"""A sweep: its runs one after the other, each a command of its own that can be given by hand."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher import exit_codes
from launcher.command_line import flags
from launcher.command_line.flags import Options
from launcher.command_line.parse import take_flag
from launcher.command_line.variants import Variant, read_variants
from launcher.launch.build import make_launch_spec
from launcher.launch.spec import LaunchSpec
from launcher.processes.failure import failure_from_exit
from launcher.sweep.foreground import Foreground
from launcher.sweep.table import FILE, Row, format_table, read_row, write_rows
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged
from trainer.console import say, warn
from trainer.errors import UserError
from trainer.run.early_stop import EarlyStop
from trainer.workdir.paths import absolute

_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class _Sweep:
    """What is run.

    Attributes:
        spec: of the config file.
        folder: of the sweep.
        arguments: of the command, without the flags that make a sweep of it.
        variants: its runs.
    """

    spec: str
    folder: str
    arguments: Sequence[str]
    variants: Sequence[Variant]

    def command(self, variant: Variant) -> list[str]:
        """The arguments that run one of them."""
        return [*self.arguments, f"--sweep_index={variant.index}", f"--workdir={self.folder}"]


def run_sweep(options: Options, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs all runs of a sweep that have not finished yet; returns the exit code.

    That is the first one that is not 0. A run that fails does not keep the others from being run;
    being asked to stop does.

    Args:
        options: of the command.
        argv: its arguments.
        environ: of this process.

    Raises:
        UserError: a run of the sweep would be refused. Then none was started.
    """
    arguments = [one for one in take_flag("workdir", argv)[1] if not re.match("--?sweep(=|$)", one)]
    spec = take_flag("config", argv)[0][0]
    folder = os.fspath(absolute(options.workdir)) if options.workdir.strip() else ""
    sweep = _Sweep(spec, folder, arguments, read_variants(spec))
    if folder and (absolute(folder) / "config.json").exists():
        raise UserError(
            f"--workdir={options.workdir} is the folder of a run",
            "name another: a sweep has a folder for each of its runs",
        )
    plans = [_plan(sweep, variant, environ) for variant in sweep.variants]
    if options.dry_run:
        print(f"{format_table(_rows(sweep, plans, {}))}\nworkdir {folder}")
        return exit_codes.DONE
    with Foreground() as foreground:
        codes, stopped = _run_all(sweep, plans, foreground, environ)
    rows = _rows(sweep, plans, codes)
    print(f"\n{format_table(rows)}", flush=True)
    say(f"numbers: {os.path.join(folder, FILE)}")
    say(f"curves: tensorboard --logdir {shlex.quote(folder)}")
    if stopped:
        say(f"to go on: the same command with {shlex.quote(f'--workdir={folder}')}")
        return _INTERRUPTED if _INTERRUPTED in codes.values() else exit_codes.RETRY
    return next((code for code in codes.values() if code), exit_codes.DONE)


def _plan(sweep: _Sweep, variant: Variant, environ: Mapping[str, str]) -> LaunchSpec:
    """Everything about a run that can be checked before it."""
    plan = make_launch_spec(flags.parse(["launcher", *sweep.command(variant)]), environ)
    if plan.placement is not None:
        raise UserError(
            f"--sweep runs on one machine, and {plan.placement.cluster} has "
            f"{plan.num_processes} processes",
            "--sweep_index=I runs one run of the sweep on all of them",
        )
    plan.folder.refuse_changes()
    return plan


def _run_all(
    sweep: _Sweep, plans: Sequence[LaunchSpec], foreground: Foreground, environ: Mapping[str, str]
) -> tuple[dict[int, int], bool]:
    """The exit codes of the runs that were begun, by index, and whether the sweep was stopped."""
    codes: dict[int, int] = {}
    stopped = False
    for variant, plan in zip(sweep.variants, plans, strict=True):
        title = f"run {variant.index} of {len(plans)}, {variant.name}"
        if is_finished(plan):
            say(f"{title}: finished before")
            codes[variant.index] = exit_codes.DONE
            continue
        if _plan(sweep, variant, environ).config != plan.config:
            raise UserError(
                f"{title}: {sweep.spec} is not what it was when the sweep began",
                "the same command goes on with what it says now",
            )
        say(f"{title}:")
        returned = foreground.run([sys.executable, "-m", "launcher", *sweep.command(variant)])
        if returned is not None:
            code = (
                returned
                if returned >= 0
                else failure_from_exit(returned, 0, 0, "", "", False).exit_code
            )
            codes[variant.index] = code
            write_rows(absolute(sweep.folder), sweep.spec, _rows(sweep, plans, codes))
            if returned < 0 and not foreground.asked_to_stop:
                warn(f"{title}: killed by {signal.Signals(-returned).name}")
            # One that was killed or hung has left a failure; one that was asked to stop has not.
            failed = returned < 0 or (plan.local_dir / "failure.json").exists()
            stopped = code == _INTERRUPTED or (code == exit_codes.RETRY and not failed)
        if foreground.asked_to_stop or stopped:
            return codes, True
    write_rows(absolute(sweep.folder), sweep.spec, _rows(sweep, plans, codes))
    return codes, False


def _rows(sweep: _Sweep, plans: Sequence[LaunchSpec], codes: Mapping[int, int]) -> list[Row]:
    return [
        read_row(variant, plan, codes.get(variant.index))
        for variant, plan in zip(sweep.variants, plans, strict=True)
    ]


def is_finished(plan: LaunchSpec) -> bool:
    """Whether the run has taken all its steps already, with this very config."""
    folder = plan.folder
    try:
        before = json.loads((folder.path / "config.json").read_text())
        latest = CheckpointFolder(folder.checkpoints, 1)
        step = latest.steps()[-1]
        meta = latest.check(step).meta
        stop = min(int(meta["num_steps"]), plan.settings.stop_at_step or sys.maxsize)
        early_stop = EarlyStop.of(plan.settings)
        early_stop.from_json(meta.get("early_stop"))
        is_over = (step >= stop or early_stop.reason) and not meta["evaluation_pending"]
    except (OSError, ValueError, LookupError, TypeError, Damaged):
        return False
    return bool(is_over) and before == json.loads(plan.config)
