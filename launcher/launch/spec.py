"""The plan of a run: which processes there are, which of them start here, and with what."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import clusters
from launcher.clusters import Placement
from launcher.clusters.gce_metadata import read_gce_metadata
from launcher.clusters.read import visible_devices
from launcher.command_line.flags import Options
from launcher.launch import environment
from trainer.config.config_json import config_to_json
from trainer.config.settings import Settings, check
from trainer.errors import UserError
from trainer.run.profiling import Profile
from trainer.workdir.paths import local_folder
from trainer.workdir.workdir import Workdir

# A worker that trains must say something within this; one that compiles, saves or evaluates,
# within ten times as long.
DEFAULT_HANG_TIMEOUT_SECS = 600


@dataclass(frozen=True)
class Limits:
    """How long to wait for what, in seconds, and how often to try again."""

    hang_timeout_secs: float
    grace_secs: float
    rendezvous_timeout_secs: float
    heartbeat_timeout_secs: int
    shutdown_timeout_secs: int
    max_restarts: int


@dataclass(frozen=True)
class WorkerSpec:
    """One process that starts here.

    Attributes:
        rank: jax's process id.
        environ: what is set for it on top of this process's environment.
        local_device_ids: which of the visible accelerators it takes; None for all.
    """

    rank: int
    environ: Mapping[str, str]
    local_device_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class LaunchSpec:
    """What is run, and where.

    Attributes:
        settings: the checked config.
        config: the config as JSON, for the workers.
        workdir: the run's folder, absolute if it is local.
        local_dir: its folder on this machine.
        local_base: where such folders are; None for the system's temporary folder.
        folder: the workdir, as it was found.
        num_processes: in the job.
        workers: those of them that start here.
        placement: where the scheduler has put this launcher; None if this machine is all there is.
        limits: times and counts.
        shown_ranks: whose output is shown here; None for all.
        profile: which steps to trace, as `START:STEPS`; None: none.
        supervised: whether the workers are processes of their own; else the only one is this.
        smoke: whether it is only tried, in a folder of its own.
    """

    settings: Settings
    config: str
    workdir: str
    local_dir: Path
    local_base: str | None
    folder: Workdir
    num_processes: int
    workers: tuple[WorkerSpec, ...]
    placement: Placement | None
    limits: Limits
    shown_ranks: frozenset[int] | None
    profile: str | None
    supervised: bool
    smoke: bool = False


def make_launch_spec(options: Options, environ: Mapping[str, str]) -> LaunchSpec:
    """Decides everything that can be decided without jax; starts and writes nothing.

    Raises:
        UserError: flags, config, workdir or the scheduler's variables are not as they should be.
    """
    settings = check(options.config)
    if options.profile is not None:
        Profile.parse(options.profile)
    placement = _place(options, environ)
    workdir = _workdir_of(options, placement)
    folder = Workdir.check(workdir, settings.config)
    if placement is not None and placement.num_processes == 1:
        placement = None  # nobody to meet
    num_processes = placement.num_processes if placement else (options.processes or 1)
    if placement is None:
        workers = _split_machine(num_processes, options.fake_devices, environ)
    else:
        prepared = _environ_of(environ, options.fake_devices)
        workers = (WorkerSpec(placement.process_id, prepared, placement.local_device_ids),)
    if placement is not None and options.max_restarts:
        raise UserError(
            f"--max_restarts={options.max_restarts} is for a job on this machine alone",
            "with exit code 42, whatever has started the ranks may start them all again; see "
            "docs/clusters.md",
        )
    _check_rows(settings, num_processes, options.fake_devices)
    return LaunchSpec(
        settings=settings,
        config=config_to_json(settings.config),
        workdir=os.fspath(folder.path),
        local_dir=local_folder(workdir, options.local_dir),
        local_base=options.local_dir,
        folder=folder,
        num_processes=num_processes,
        workers=workers,
        placement=placement,
        limits=Limits(
            options.hang_timeout_secs or DEFAULT_HANG_TIMEOUT_SECS,
            options.grace_secs,
            options.rendezvous_timeout_secs,
            options.heartbeat_timeout_secs,
            options.shutdown_timeout_secs,
            options.max_restarts,
        ),
        shown_ranks=_ranks(options.log_ranks, num_processes),
        profile=options.profile,
        supervised=num_processes > 1
        or options.max_restarts > 0
        or options.hang_timeout_secs is not None,
    )


def _place(options: Options, environ: Mapping[str, str]) -> Placement | None:
    by_hand = (options.coordinator_address, options.num_processes, options.process_id)
    given = any(value is not None for value in by_hand)
    if given and (options.processes or options.cluster not in ("auto", "none")):
        other = "--processes" if options.processes else "--cluster"
        raise UserError(
            f"{other} and --coordinator_address, --num_processes, --process_id exclude each other",
            "the three name the place of this one process in a job",
        )
    env = {**environ}
    gpus = count_gpus(environ)
    if gpus:
        env["PODLIFT_NUM_GPUS"] = str(gpus)
    if given:
        return clusters.by_hand(*by_hand, env)
    if options.processes and options.cluster == "auto":
        # Asked for by hand; only a scheduler that has started several ranks is in the way.
        found = clusters.detect(env) if _is_one_of_several(environ) else None
        if found is not None and found.num_processes > 1:
            raise UserError(
                f"--processes={options.processes}, but {found.cluster} has started "
                f"{found.num_processes} processes already",
                "leave --processes out, or give --cluster=none",
            )
        return None
    if options.cluster in ("auto", "tpu_gce"):
        env |= read_gce_metadata(environ)
    return clusters.detect(env, options.cluster)


def _is_one_of_several(environ: Mapping[str, str]) -> bool:
    """Whether a scheduler's step, not merely its batch shell, has started this process."""
    return any(name in environ for name in ("SLURM_STEP_ID", "OMPI_COMM_WORLD_SIZE"))


def _workdir_of(options: Options, placement: Placement | None) -> str:
    if not options.has_workdir and placement is not None and placement.num_processes > 1:
        raise UserError(
            f"--workdir is missing: {placement.cluster} has {placement.num_processes} processes",
            "name a folder that all hosts share",
        )
    return options.workdir


def _split_machine(
    count: int, fake_devices: int | None, environ: Mapping[str, str]
) -> tuple[WorkerSpec, ...]:
    """The workers of a job on this machine, which share its GPUs if it has any."""
    prepared = _environ_of(environ, fake_devices)
    gpus = 0 if environ.get("JAX_PLATFORMS") == "cpu" or fake_devices else count_gpus(environ)
    if count == 1 or not gpus:
        return tuple(WorkerSpec(rank, prepared, None) for rank in range(count))
    if gpus % count:
        raise UserError(
            f"--processes={count} cannot share {gpus} GPUs equally",
            f"{' or '.join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)} processes can, or "
            "narrow CUDA_VISIBLE_DEVICES",
        )
    share = gpus // count
    listed = environ.get("CUDA_VISIBLE_DEVICES", "")
    names = listed.split(",")[:gpus] if listed else [str(i) for i in range(gpus)]
    return tuple(
        WorkerSpec(
            rank,
            {
                **prepared,
                "CUDA_VISIBLE_DEVICES": ",".join(names[rank * share : (rank + 1) * share]),
            },
            None,
        )
        for rank in range(count)
    )


def _environ_of(environ: Mapping[str, str], fake_devices: int | None) -> dict[str, str]:
    """What `environment.prepare` changes."""
    changed = dict(environ)
    environment.prepare(changed, fake_devices)
    return {name: value for name, value in changed.items() if environ.get(name) != value}


def count_gpus(environ: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """How many NVIDIA GPUs this process may use, without asking CUDA."""
    visible = visible_devices(environ)
    if visible is not None:
        return visible
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def _check_rows(settings: Settings, num_processes: int, fake_devices: int | None) -> None:
    """What jax would find out later: the batch has to divide by the processes at least."""
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


def _ranks(text: str, num_processes: int) -> frozenset[int] | None:
    """`--log_ranks`, as ranks; None for all."""
    if text == "all":
        return None
    try:
        ranks = frozenset(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(
            f"--log_ranks={text} is neither all nor numbers", "0, all, or 1,3"
        ) from None
    odd = sorted(rank for rank in ranks if not 0 <= rank < num_processes)
    if odd:
        raise UserError(f"--log_ranks={text}: there is no rank {odd[0]} of {num_processes}")
    return ranks


def detected(placement: Placement) -> str:
    """One line on what was detected, and from what."""
    source = f", from {', '.join(placement.variables)}" if placement.variables else ""
    restarts = f", restart {placement.attempt}" if placement.attempt else ""
    return (
        f"{placement.cluster}: process {placement.process_id} of {placement.num_processes}, rank 0 "
        f"at {placement.host}:{placement.port}{restarts}{source}"
    )


def describe(plan: LaunchSpec, environ: Mapping[str, str]) -> str:
    """The plan for `--dry_run`: processes, what is set for each, where they meet, the mesh.

    Args:
        plan: what is run.
        environ: the environment it was made in.
    """
    settings, placement = plan.settings, plan.placement
    if placement is None:
        rows = [("cluster", "none: this machine")]
        if plan.num_processes > 1:
            rows.append(("coordinator", "127.0.0.1, a free port at each attempt"))
    else:
        rows = [
            ("cluster", detected(placement)),
            ("rendezvous", f"{placement.host}:{placement.port}, where rank 0 names a free port"),
        ]
    count = plan.num_processes
    batch = settings.global_batch_size
    rows.append(("processes", f"{count}, {len(plan.workers)} of them started here"))
    per_process = _devices_per_process(plan, environ)
    if per_process is None:
        devices = "all devices that jax finds"
        share = f"{batch // count} a process" if count > 1 else "divided by the devices"
    else:
        devices = f"{per_process * count} devices"
        devices += f" ({per_process} a process)" if count > 1 else ""
        share = f"{batch // count} a process, {batch // (count * per_process)} a device"
    rows += [
        ("mesh", f'{devices} on one axis, "batch"; lift {settings.lift}'),
        ("global batch", f"{batch}: {share}"),
        ("workdir", plan.workdir + (" (goes on from its newest checkpoint)" * plan.folder.exists)),
        ("supervised", "yes" if plan.supervised else "no: runs in place"),
    ]
    for worker in plan.workers:
        ids = worker.local_device_ids
        shown = [f"{name}={value}" for name, value in sorted(worker.environ.items())]
        shown += [] if ids is None else [f"local devices {','.join(map(str, ids))}"]
        rows.append((f"rank {worker.rank}", "  ".join(shown) or "the environment as it is"))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {text}\n" for name, text in rows)


def _devices_per_process(plan: LaunchSpec, environ: Mapping[str, str]) -> int | None:
    """How many devices each process uses, where that is known before jax is asked."""
    if plan.settings.devices_per_process is not None:
        return plan.settings.devices_per_process
    worker = plan.workers[0]
    environ = {**environ, **worker.environ}
    fake = environment.fake_device_count(environ)
    if fake:
        return fake
    if worker.local_device_ids is not None:
        return len(worker.local_device_ids)
    return count_gpus(environ) or None


def host_name() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
