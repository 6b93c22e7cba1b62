"""Finds the scheduler that started this process, or takes the place that three flags give."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.clusters import read
from launcher.clusters.kubernetes import Kubernetes
from launcher.clusters.open_mpi import OpenMpi
from launcher.clusters.placement import Cluster, Placement
from launcher.clusters.slurm import Slurm
from launcher.clusters.tpu import TpuGce, TpuGke
from trainer.errors import UserError

# The order matters: mpirun runs inside SLURM jobs and pods, and a pod with TPUs is a pod.
CLUSTERS: tuple[Cluster, ...] = (OpenMpi(), Slurm(), TpuGke(), TpuGce(), Kubernetes())


def detect(env: Mapping[str, str], choice: str = "auto") -> Placement | None:
    """The place of this process in its job.

    Args:
        env: environment variables, with those that the launcher adds: `gce/*` from
            `gce_metadata.read_gce_metadata`, and PODLIFT_NUM_GPUS, the number of this machine's
            GPUs.
        choice: "auto", "none", or the name of one of `CLUSTERS`.

    Returns:
        The placement; None for a job on this machine alone.

    Raises:
        UserError: the chosen cluster was not found, or its variables contradict each other.
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
    missing = read.missing(env, chosen.required)
    if missing:
        raise UserError(f"--cluster={choice}, but {', '.join(missing)} is not set", chosen.hint)
    if not chosen.detect(env):
        raise UserError(f"--cluster={choice}, but it did not start this process", chosen.hint)
    return _place(chosen, env)


def by_hand(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    env: Mapping[str, str],
) -> Placement:
    """The placement that three flags give.

    Args:
        coordinator_address: `HOST:PORT` of rank 0.
        num_processes: number of processes in the job.
        process_id: rank of this process.
        env: environment variables, of which PODLIFT_RESTART_ATTEMPT counts restarts.

    Raises:
        UserError: one of the three is missing, malformed or out of range.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        verb = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{' and '.join(missing)} {verb} missing", f"{', '.join(flags)} go together"
        )
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
    """The placement by a cluster's answers. PODLIFT_COORDINATOR_ADDRESS overrides its address."""
    names = tuple(name for name in cluster.variables if env.get(name))
    size, rank = cluster.size(env), cluster.rank(env)
    _check(size, rank, ", ".join(names))
    # On GKE a pod whose manifest lacks a subdomain sees itself alone, so each pod would train a
    # model of its own. The manifests of podlift declare the number of pods.
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
    if size < 1:
        raise UserError(f"a job of {size} processes", f"look at {source}")
    if not 0 <= rank < size:
        raise UserError(f"process {rank} is not in 0..{size - 1}", f"look at {source}")
