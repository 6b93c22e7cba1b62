"""Where this process stands in a job that a scheduler started.

Decided from environment variables and nothing else, so that what happens on a cluster can be
replayed from a file. jax is told the result and detects nothing by itself: what it guesses is wrong
too often, and cannot be shown to a person before it hangs.

One file a scheduler, each with the five or six questions of `Cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from launcher.clusters import read
from launcher.clusters.kubernetes import Kubernetes
from launcher.clusters.open_mpi import OpenMpi
from launcher.clusters.slurm import Slurm
from launcher.clusters.tpu import TpuGce, TpuGke
from trainer.errors import UserError

__all__ = ["CLUSTERS", "Cluster", "Placement", "by_hand", "detect"]


@dataclass(frozen=True)
class Placement:
    """A process among those of its job.

    Attributes:
        cluster: the scheduler's name in `CLUSTERS`, or "by hand".
        host: of rank 0, where the ranks meet; an IPv6 address is without brackets.
        port: where the launcher of rank 0 listens for the others. jax's coordinator has another,
            chosen afresh at each attempt.
        num_processes: in the job; 1 for a job of one process.
        process_id: of this one, also called its rank, from 0.
        local_device_ids: which of the visible accelerators are this process's, as indices into
            those; None for all.
        attempt: how often the scheduler has restarted the job.
        job: the same on all ranks of a job, and another for another job.
        variables: names of those that decided.
    """

    cluster: str
    host: str
    port: int
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None
    attempt: int
    job: str
    variables: tuple[str, ...]


class Cluster(Protocol):
    """What a scheduler's file answers; all from the variables alone."""

    @property
    def name(self) -> str:
        """For `--cluster`."""

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """Variables it cannot do without, each as a tuple of alternatives."""

    @property
    def variables(self) -> tuple[str, ...]:
        """All that it reads to find the ranks."""

    @property
    def hint(self) -> str:
        """What to do if one of the required ones is missing."""

    def detect(self, env: Mapping[str, str]) -> bool:
        """Whether this process is part of such a job; raises UserError if only halfway."""

    def address(self, env: Mapping[str, str]) -> tuple[str, int]:
        """Host of rank 0, and the port where its launcher listens."""

    def size(self, env: Mapping[str, str]) -> int:
        """The number of processes in the job."""

    def rank(self, env: Mapping[str, str]) -> int:
        """The number of this one."""

    def local_device_ids(self, env: Mapping[str, str]) -> tuple[int, ...] | None:
        """Its accelerators, as indices into the visible ones; None for all."""

    def attempt(self, env: Mapping[str, str]) -> int:
        """How often the scheduler has restarted the job."""

    def job(self, env: Mapping[str, str]) -> str:
        """The job's name, unlike any other's."""


# In order of checking: mpirun runs inside of SLURM jobs and pods, pods with TPUs are pods.
CLUSTERS: tuple[Cluster, ...] = (OpenMpi(), Slurm(), TpuGke(), TpuGce(), Kubernetes())


def detect(env: Mapping[str, str], choice: str = "auto") -> Placement | None:
    """Where this process stands.

    Args:
        env: environment variables, with those that the launcher adds: `gce/*` from
            `gce_metadata.read_gce_metadata`, and PODLIFT_NUM_GPUS, the number of this machine's
            GPUs.
        choice: "auto", "none", or the name of one of `CLUSTERS`.

    Returns:
        The placement, or None if this machine is to run by itself.

    Raises:
        UserError: the chosen cluster is not there, or its variables contradict each other.
    """
    if choice == "none":
        return None
    if choice == "auto":
        for cluster in CLUSTERS:
            if cluster.detect(env):
                return _place(cluster, env)
        return None
    chosen = next((cluster for cluster in CLUSTERS if cluster.name == choice), None)
    if chosen is None:
        names = ", ".join(cluster.name for cluster in CLUSTERS)
        raise UserError(f"--cluster={choice}: there is no such cluster", f"auto, none, {names}")
    lack = read.missing(env, chosen.required)
    if lack:
        raise UserError(f"--cluster={choice}, but {', '.join(lack)} is not set", chosen.hint)
    if not chosen.detect(env):
        raise UserError(f"--cluster={choice}, but it did not start this process", chosen.hint)
    return _place(chosen, env)


def by_hand(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    env: Mapping[str, str],
) -> Placement:
    """The placement that a person gives with three flags, the same command on each host.

    Args:
        coordinator_address: `HOST:PORT` of rank 0.
        num_processes: in the job.
        process_id: of this one.
        env: environment variables, of which PODLIFT_RESTART_ATTEMPT counts restarts.

    Raises:
        UserError: one of the three is missing, malformed or out of range.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    lack = [name for name, value in flags.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        verb = "are" if len(lack) > 1 else "is"
        raise UserError(f"{' and '.join(lack)} {verb} missing", f"{', '.join(flags)} go together")
    host, port = read.parse_address(coordinator_address, "--coordinator_address")
    _check(num_processes, process_id, "--num_processes and --process_id")
    return Placement(
        cluster="by hand",
        host=host,
        port=port,
        num_processes=num_processes,
        process_id=process_id,
        local_device_ids=None,
        attempt=read.integer(env, "PODLIFT_RESTART_ATTEMPT", default=0, minimum=0),
        job=f"by hand {coordinator_address.strip()}",
        variables=(),
    )


def _place(cluster: Cluster, env: Mapping[str, str]) -> Placement:
    """Asks a cluster everything. PODLIFT_COORDINATOR_ADDRESS wins over what it would guess."""
    names = tuple(name for name in cluster.variables if env.get(name))
    size, rank = cluster.size(env), cluster.rank(env)
    _check(size, rank, ", ".join(names))
    # A pod on GKE whose manifest lacks a subdomain is told that it is alone: each would train for
    # itself. Our manifests say how many there are.
    declared = read.integer(env, "PODLIFT_NUM_PROCESSES", default=size)
    if declared != size:
        raise UserError(
            f"PODLIFT_NUM_PROCESSES={declared}, but {cluster.name} has {size}",
            f"look at {', '.join(names)}",
        )
    given = env.get(read.COORDINATOR)
    if given:
        names += (read.COORDINATOR,)
        host, port = read.parse_address(given, read.COORDINATOR, read.DEFAULT_PORT)
    else:
        host, port = cluster.address(env)
    return Placement(
        cluster=cluster.name,
        host=host,
        port=port,
        num_processes=size,
        process_id=rank,
        local_device_ids=cluster.local_device_ids(env),
        attempt=cluster.attempt(env),
        job=cluster.job(env),
        variables=names,
    )


def _check(size: int, rank: int, source: str) -> None:
    """Raises a UserError unless there are processes and this is one of them."""
    if size < 1:
        raise UserError(f"a job of {size} processes", f"look at {source}")
    if not 0 <= rank < size:
        raise UserError(f"process {rank} is not in 0..{size - 1}", f"look at {source}")
