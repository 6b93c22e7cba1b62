"""The launch of a run as data: its processes, which of them start here, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.clusters.placement import Placement
from trainer.config.settings import Settings
from trainer.workdir.workdir import Workdir


@dataclass(frozen=True)
class Limits:
    """Timeouts in seconds, and the number of restarts."""

    hang_timeout_secs: float
    grace_secs: float
    rendezvous_timeout_secs: float
    heartbeat_timeout_secs: int
    shutdown_timeout_secs: int
    max_restarts: int


@dataclass(frozen=True)
class WorkerSpec:
    """One process that starts on this machine.

    Attributes:
        rank: jax's process id.
        environ: variables added to the launcher's own environment.
        local_device_ids: indices into the visible accelerators; None for all of them.
    """

    rank: int
    environ: Mapping[str, str]
    local_device_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class LaunchSpec:
    """What to run, and where.

    Attributes:
        settings: the checked config.
        config: the config as JSON, for the workers.
        workdir: the run's folder; absolute if it is local.
        local_dir: the run's folder on this machine.
        local_base: the parent of such folders; None for the system's temporary folder.
        folder: the workdir as it was found.
        num_processes: number of processes in the job.
        workers: the processes that start here.
        placement: this launcher's place in the cluster; None for a job on this machine alone.
        limits: timeouts and restarts.
        shown_ranks: ranks whose output the terminal shows; None for all.
        profile: the steps to trace, as `START:STEPS`; None for none.
        supervised: whether the workers are child processes; if not, this process trains.
        smoke: whether this is a smoke test, in a folder of its own.
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

    @property
    def has_rank_0(self) -> bool:
        """Whether rank 0 starts here. Its launcher reports on the job as a whole."""
        return any(worker.rank == 0 for worker in self.workers)
