"""Runs the variants of a sweep one after the other, each as a command that also works by hand."""

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
from launcher.processes.lost_peers import LostPeers
from launcher.sweep.foreground import Foreground
from launcher.sweep.table import FILE, Row, format_table, read_row, write_rows
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged
from trainer.console import say, show, warn
from trainer.errors import UserError
from trainer.run.early_stop import EarlyStop
from trainer.workdir.json_object import read_object
from trainer.workdir.paths import absolute

_INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class _Sweep:
    """A sweep.

    Attributes:
        config: the value of --config.
        folder: the folder of the sweep.
        arguments: the arguments of the command, without those of the sweep.
        variants: the variants to run.
    """

    config: str
    folder: str
    arguments: Sequence[str]
    variants: Sequence[Variant]

    def command(self, variant: Variant) -> list[str]:
        """The arguments that run one variant."""
        return [*self.arguments, f"--sweep_index={variant.index}", f"--workdir={self.folder}"]


def run_sweep(options: Options, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs all variants that have not finished yet.

    A run that fails does not stop the sweep; a request to stop does.

    Args:
        options: the parsed command line.
        argv: its arguments.
        environ: environment of this process.

    Returns:
        The exit code: the first one of a run that is not 0.

    Raises:
        UserError: a run of the sweep would be refused. Then none has started.
    """
    arguments = [one for one in take_flag("workdir", argv)[1] if not re.match("--?sweep(=|$)", one)]
    config = take_flag("config", argv)[0][0]
    folder = os.fspath(absolute(options.workdir)) if options.workdir.strip() else ""
    sweep = _Sweep(config, folder, arguments, read_variants(config))
    if folder and (absolute(folder) / "config.json").exists():
        raise UserError(
            f"--workdir={options.workdir} is the folder of a run",
            "name another folder: a sweep has a subfolder for each run",
        )
    specs = [_make_spec(sweep, variant, environ) for variant in sweep.variants]
    if options.dry_run:
        show(f"{format_table(_rows(sweep, specs, {}))}\nworkdir {folder}")
        return exit_codes.DONE
    with Foreground() as foreground:
        codes, stopped = _run_all(sweep, specs, foreground, environ)
    rows = _rows(sweep, specs, codes)
    show(f"\n{format_table(rows)}")
    say(f"results: {os.path.join(folder, FILE)}")
    say(f"curves: tensorboard --logdir {shlex.quote(folder)}")
    if stopped:
        say(f"to resume: the same command with {shlex.quote(f'--workdir={folder}')}")
        return _INTERRUPTED if _INTERRUPTED in codes.values() else exit_codes.RETRY
    return next((code for code in codes.values() if code), exit_codes.DONE)


def _make_spec(sweep: _Sweep, variant: Variant, environ: Mapping[str, str]) -> LaunchSpec:
    """Checks everything about a run that can be checked before it starts."""
    spec = make_launch_spec(flags.parse(["launcher", *sweep.command(variant)]), environ)
    if spec.placement is not None:
        raise UserError(
            f"--sweep runs on one machine, and {spec.placement.cluster} has "
            f"{spec.num_processes} processes",
            "--sweep_index=I runs one variant of the sweep on all of them",
        )
    spec.folder.refuse_changes()
    return spec


def _run_all(
    sweep: _Sweep, specs: Sequence[LaunchSpec], foreground: Foreground, environ: Mapping[str, str]
) -> tuple[dict[int, int], bool]:
    """The exit codes of the runs that started, by index, and whether the sweep was stopped."""
    codes: dict[int, int] = {}
    stopped = False
    for variant, spec in zip(sweep.variants, specs, strict=True):
        title = f"run {variant.index} of {len(specs)}, {variant.name}"
        if is_finished(spec):
            say(f"{title}: already finished")
            codes[variant.index] = exit_codes.DONE
            continue
        if _make_spec(sweep, variant, environ).config != spec.config:
            raise UserError(
                f"{title}: {sweep.config} has changed since the sweep started",
                "the same command continues with the new config",
            )
        say(f"{title}:")
        returned = foreground.run([sys.executable, "-m", "launcher", *sweep.command(variant)])
        if returned is not None:
            code = (
                returned
                if returned >= 0
                else failure_from_exit(returned, 0, 0, "", LostPeers(), False).exit_code
            )
            codes[variant.index] = code
            write_rows(absolute(sweep.folder), sweep.config, _rows(sweep, specs, codes))
            if returned < 0 and not foreground.asked_to_stop:
                warn(f"{title}: killed by {signal.Signals(-returned).name}")
            # A run that was killed or hung leaves a failure.json; a stopped one does not.
            failed = returned < 0 or (spec.local_dir / "failure.json").exists()
            stopped = code == _INTERRUPTED or (code == exit_codes.RETRY and not failed)
        if foreground.asked_to_stop or stopped:
            return codes, True
    write_rows(absolute(sweep.folder), sweep.config, _rows(sweep, specs, codes))
    return codes, False


def _rows(sweep: _Sweep, specs: Sequence[LaunchSpec], codes: Mapping[int, int]) -> list[Row]:
    return [
        read_row(variant, spec, codes.get(variant.index))
        for variant, spec in zip(sweep.variants, specs, strict=True)
    ]


def is_finished(spec: LaunchSpec) -> bool:
    """Whether the run has already finished, with the same config."""
    folder = spec.folder
    try:
        before = read_object(folder.path / "config.json")
        latest = CheckpointFolder(folder.checkpoints, 1)
        step = latest.steps()[-1]
        meta = latest.check(step).meta
        stop = min(int(meta["num_steps"]), spec.settings.stop_at_step or sys.maxsize)
        early_stop = EarlyStop.of(spec.settings)
        early_stop.from_json(meta.get("early_stop"))
        is_over = (step >= stop or early_stop.reason) and not meta["evaluation_pending"]
    except (OSError, ValueError, LookupError, TypeError, Damaged):
        return False
    return bool(is_over) and before == json.loads(spec.config)
