"""Finds the scheduler that started this process, or takes the place that three flags give."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.clusters import launchers, read
from launcher.clusters.allocation import read_node_file, refuse_idle_hosts
from launcher.clusters.gce_metadata import read_gce_metadata
from launcher.clusters.host_lists import (
    SageMaker,
    TfConfig,
    Vertex,
    Volcano,
    read_resource_config,
)
from launcher.clusters.kubernetes import Kubernetes
from launcher.clusters.open_mpi import OpenMpi
from launcher.clusters.placement import Cluster, Placement
from launcher.clusters.pmi import read_pmi
from launcher.clusters.ranks import Ranks
from launcher.clusters.slurm import Slurm
from launcher.clusters.tpu import TpuGce, TpuGke
from trainer.errors import UserError

# The first that started this process counts. What runs inside others comes before them: torchrun
# in a SLURM task, mpirun in a SLURM job, jsrun that poses as Open MPI, SLURM that speaks PMI. Then
# come TPU slices and manifests written for podlift, and last the variables of other platforms.
CLUSTERS: tuple[Cluster, ...] = (
    launchers.TORCHRUN,
    launchers.HOROVOD,
    launchers.JSRUN,
    OpenMpi(),
    launchers.FLUX,
    launchers.HYDRA,
    launchers.MVAPICH,
    Slurm(),
    launchers.PMI,
    TpuGke(),
    TpuGce(),
    Kubernetes(),
    launchers.KUBEFLOW,
    launchers.TORCH_ENV,
    launchers.JAX,
    launchers.JAX_JOB,
    Vertex(),
    TfConfig(),
    SageMaker(),
    launchers.LWS,
    launchers.SKYPILOT,
    launchers.DSTACK,
    launchers.METAFLOW,
    launchers.BEAKER,
    launchers.AWS_BATCH,
    Volcano(),
)
_MPI = ("open_mpi", "jsrun", "flux", "hydra", "mvapich")
# Launchers that podlift cannot join: the first count processes, the others only number them.
_COUNTS = {"_CONDOR_NPROCS": "HTCondor", "NGC_ARRAY_SIZE": "Base Command"}
_SIGNS = (
    "PMIX_RANK",
    "PALS_RANKID",
    "ALPS_APP_PE",
    "JAX_COORDINATOR_ADDRESS",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


def detect(
    env: Mapping[str, str], choice: str = "auto", this_machine: bool = False
) -> Placement | None:
    """The place of this process in its job.

    Args:
        env: environment variables, with those that `with_machine` adds.
        choice: "auto", "none", or the name of one of `CLUSTERS`.
        this_machine: whether the user has asked for processes on this machine, so that it is no
            mistake if a batch job has other hosts too.

    Returns:
        The placement; None for a job on this machine alone.

    Raises:
        UserError: the chosen cluster was not found, its variables contradict each other, or
            something that has started several processes does not say what podlift must know.
    """
    if choice == "none":
        return None
    cluster = _find(env, choice)
    if cluster is None:
        if not this_machine:
            refuse_idle_hosts(env)
        _refuse_unknown(env)
        return None
    found = _place(cluster, env)
    if choice == "auto" and found.num_processes == 1:
        _refuse_another(env, cluster, found)
    return found


def with_machine(environ: Mapping[str, str], num_gpus: int, choice: str = "auto") -> dict[str, str]:
    """Environment variables, and with them what only this machine or its services know.

    Args:
        environ: environment variables.
        num_gpus: number of GPUs of this machine, as PODLIFT_NUM_GPUS.
        choice: as for `detect`. What the choice does not need is not asked for.

    Raises:
        UserError: a service exists but does not answer.
    """
    env = {**environ, **({"PODLIFT_NUM_GPUS": str(num_gpus)} if num_gpus else {})}
    if choice in ("auto", "tpu_gce"):
        env |= read_gce_metadata(environ)
    env |= read_node_file(environ) | read_resource_config(environ)
    cluster = None if choice == "none" else _find(env, choice)
    if cluster and launchers.PMI_HOST in cluster.variables and not env.get(read.COORDINATOR):
        env |= read_pmi(environ)
    return env


def _find(env: Mapping[str, str], choice: str) -> Cluster | None:
    if choice == "auto":
        return next((cluster for cluster in CLUSTERS if cluster.detect(env)), None)
    chosen = next((cluster for cluster in CLUSTERS if cluster.name == choice), None)
    if chosen is None:
        names = ", ".join(cluster.name for cluster in CLUSTERS)
        raise UserError(f"--cluster={choice}: there is no such cluster", f"auto, none, {names}")
    missing = read.missing(env, chosen.required)
    if missing:
        raise UserError(f"--cluster={choice}, but {', '.join(missing)} is not set", chosen.hint)
    if not chosen.detect(env):
        raise UserError(f"--cluster={choice}, but it did not start this process", chosen.hint)
    return chosen


def _refuse_another(env: Mapping[str, str], cluster: Cluster, found: Placement) -> None:
    """Refuses a job of one process inside one of several.

    Two tasks of SLURM that run torchrun without --nnodes, say, would train two models. SLURM's
    variables are exempt inside MPI, where they count the daemons of mpirun.
    """
    for other in CLUSTERS[CLUSTERS.index(cluster) + 1 :]:
        if cluster.name in _MPI and other.name == "slurm":
            continue
        try:
            size = other.size(env) if other.detect(env) else 1
        except UserError:
            continue  # half of its variables: no sign of a job of several
        if size > 1:
            raise UserError(
                f"{cluster.name} has 1 process ({', '.join(found.variables)}), but {other.name} "
                f"has {size} ({', '.join(name for name in other.variables if env.get(name))})",
                f"--cluster={other.name}, or --cluster=none to train on this machine alone",
            )


def _refuse_unknown(env: Mapping[str, str]) -> None:
    """Refuses to train alone where something may have started several processes.

    Each of them would train a model of its own.
    """
    Kubernetes.refuse_manifest(env)
    for cluster in CLUSTERS:
        if isinstance(cluster, Ranks) and (
            not cluster.marker_names or any(map(env.get, cluster.marker_names))
        ):
            size = next((name for name in cluster.size_names if env.get(name)), None)
            if size and read.integer(env, size) > 1:
                names = " or ".join(cluster.rank_names)
                raise UserError(f"{size}={env[size]}, but {names} is not set", read.BY_HAND)
    for name, system in _COUNTS.items():
        if read.integer(env, name, default=1) > 1:
            raise UserError(
                f"{name}={env[name]}: podlift does not know how to join a job of {system}",
                read.BY_HAND,
            )
    for name in _SIGNS:
        # The shells of a SLURM job may be started by srun with PMIx.
        if env.get(name) and not (name == "PMIX_RANK" and env.get("SLURM_JOB_ID")):
            raise UserError(
                f"{name}={env[name]} is of a job of several processes, and no variable says how "
                "many",
                read.BY_HAND,
            )


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
