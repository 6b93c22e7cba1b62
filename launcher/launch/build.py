"""Builds a `LaunchSpec` from options, config, workdir and the scheduler's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher.clusters import detect
from launcher.clusters.placement import Placement
from launcher.command_line.flags import Options
from launcher.launch.spec import LaunchSpec, Limits, WorkerSpec
from launcher.launch.workers import changed_environ, count_gpus, local_workers
from trainer.config.config_json import config_to_json
from trainer.config.settings import Settings, check
from trainer.errors import UserError
from trainer.run.profiling import Profile
from trainer.workdir.paths import local_folder
from trainer.workdir.workdir import Workdir

# Without progress in training; compiling, saving and evaluating may take ten times as long.
DEFAULT_HANG_TIMEOUT_SECS = 600


def make_launch_spec(options: Options, environ: Mapping[str, str]) -> LaunchSpec:
    """Decides everything that does not need jax; starts and writes nothing.

    Raises:
        UserError: flags, config, workdir or the scheduler's variables are invalid.
    """
    settings = check(options.config)
    if options.profile is not None:
        Profile.parse(options.profile)
    placement = _find_placement(options, environ)
    _check_workdir_is_given(options, placement)
    local_dir = local_folder(options.workdir, options.local_dir)
    folder = Workdir.check(options.workdir, settings.config)
    if placement is not None and placement.num_processes == 1:
        placement = None  # no rendezvous
    if placement is not None and options.max_restarts:
        raise UserError(
            f"--max_restarts={options.max_restarts} is for a job on this machine alone",
            "on a cluster the scheduler restarts all ranks after exit code 42; see "
            "docs/clusters.md",
        )
    num_processes = placement.num_processes if placement else (options.processes or 1)
    _check_batch_size(settings, num_processes, options.fake_devices)
    return LaunchSpec(
        settings=settings,
        config=config_to_json(settings.config),
        workdir=os.fspath(folder.path),
        local_dir=local_dir,
        local_base=options.local_dir,
        folder=folder,
        num_processes=num_processes,
        workers=_workers(options, placement, environ),
        placement=placement,
        limits=Limits(
            options.hang_timeout_secs or DEFAULT_HANG_TIMEOUT_SECS,
            options.grace_secs,
            options.rendezvous_timeout_secs,
            options.heartbeat_timeout_secs,
            options.shutdown_timeout_secs,
            options.max_restarts,
        ),
        shown_ranks=_parse_ranks(options.log_ranks, num_processes),
        profile=options.profile,
        supervised=num_processes > 1
        or options.max_restarts > 0
        or options.hang_timeout_secs is not None,
    )


def _find_placement(options: Options, environ: Mapping[str, str]) -> Placement | None:
    by_hand = (options.coordinator_address, options.num_processes, options.process_id)
    given = any(value is not None for value in by_hand)
    if given and (options.processes or options.cluster not in ("auto", "none")):
        other = "--processes" if options.processes else "--cluster"
        raise UserError(
            f"{other} and --coordinator_address, --num_processes, --process_id exclude each other",
            "the three flags give the place of this one process in a job",
        )
    if given:
        return detect.by_hand(*by_hand, environ)
    env = detect.with_machine(environ, count_gpus(environ), options.cluster)
    found = detect.detect(env, options.cluster, this_machine=bool(options.processes))
    if options.processes and options.cluster == "auto":
        # --processes overrides a scheduler, unless that has started several processes already.
        if found is not None and found.num_processes > 1:
            raise UserError(
                f"--processes={options.processes}, but {found.cluster} has started "
                f"{found.num_processes} processes already",
                "leave --processes out, or give --cluster=none",
            )
        return None
    return found


def _check_workdir_is_given(options: Options, placement: Placement | None) -> None:
    if not options.has_workdir and placement is not None and placement.num_processes > 1:
        raise UserError(
            f"--workdir is missing: {placement.cluster} has {placement.num_processes} processes",
            "name a folder that all hosts share",
        )


def _workers(
    options: Options, placement: Placement | None, environ: Mapping[str, str]
) -> tuple[WorkerSpec, ...]:
    if placement is None:
        return local_workers(options.processes or 1, options.fake_devices, environ)
    prepared = changed_environ(environ, options.fake_devices)
    return (WorkerSpec(placement.process_id, prepared, placement.local_device_ids),)


def _check_batch_size(settings: Settings, num_processes: int, fake_devices: int | None) -> None:
    """Refuses early what jax would refuse later; without jax only a lower bound is known."""
    devices = num_processes * (settings.devices_per_process or fake_devices or 1)
    if settings.global_batch_size % devices and settings.lift.partition(":")[0] != "vmap":
        below = settings.global_batch_size // devices * devices
        sizes = " or ".join(str(n) for n in (below, below + devices) if n)
        what = "devices" if fake_devices or settings.devices_per_process else "processes"
        raise UserError(
            f"config.global_batch_size={settings.global_batch_size} does not divide by "
            f"{devices} {what}",
            f"the nearest sizes that do: {sizes}",
        )


def _parse_ranks(text: str, num_processes: int) -> frozenset[int] | None:
    """The ranks of `--log_ranks`; None for all."""
    if text == "all":
        return None
    try:
        ranks = frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(
            f"--log_ranks={text} is neither all nor numbers", "0, all, or 1,3"
        ) from None
    unknown = sorted(rank for rank in ranks if not 0 <= rank < num_processes)
    if unknown:
        raise UserError(f"--log_ranks={text}: there is no rank {unknown[0]} of {num_processes}")
    return ranks
