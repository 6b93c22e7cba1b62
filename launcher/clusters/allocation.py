"""Batch jobs of several hosts or tasks, whose script runs once: on the first host, alone.

A program in such a script would train on one host and leave the others idle, without a word.
Whatever starts a process on each of them (srun, mpirun, jsrun) is detected before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.clusters import read
from launcher.clusters.slurm import Slurm
from trainer.errors import UserError

PBS_HOSTS = "pbs/hosts"  # from `read_node_file`
_MPI = "start it with mpirun, one process a host; or "


def read_node_file(environ: Mapping[str, str]) -> dict[str, str]:
    """`pbs/hosts`: the lines of PBS_NODEFILE, which only the first host has."""
    name = environ.get("PBS_NODEFILE")
    if not name:
        return {}
    try:
        return {PBS_HOSTS: Path(name).read_text(errors="replace")}
    except OSError:
        return {}


def refuse_idle_hosts(env: Mapping[str, str]) -> None:
    """Refuses to train on one host of several that the batch system has given to the job.

    SLURM's shells are described in `slurm`. PBS lists the hosts of a job in PBS_NODEFILE
    (https://help.altair.com, PBS Professional User's Guide), Torque counts them in PBS_NUM_NODES,
    Grid Engine in NHOSTS (qsub(1), ENVIRONMENTAL VARIABLES), and LSF lists them with their slots in
    LSB_MCPU_HOSTS (https://www.ibm.com/docs/en/spectrum-lsf, Environment variables).

    Args:
        env: the variables, with those of `read_node_file`.

    Raises:
        UserError: the job has several hosts or tasks.
    """
    Slurm.refuse_shell(env)
    if env.get("PBS_JOBID"):
        count = len(set(env.get(PBS_HOSTS, "").split()))
        if count < 2:
            count = read.integer(env, "PBS_NUM_NODES", default=1)
        _refuse("PBS", "PBS_NODEFILE", count)
    if env.get("PE_HOSTFILE") and env.get("JOB_ID"):
        _refuse("Grid Engine", "PE_HOSTFILE", read.integer(env, "NHOSTS", default=1))
    if env.get("LSB_JOBID"):
        _refuse("LSF", "LSB_MCPU_HOSTS", len(set(env.get("LSB_MCPU_HOSTS", "").split()[::2])))


def _refuse(system: str, name: str, count: int) -> None:
    if count > 1:
        raise UserError(
            f"{system} has {count} hosts for this job ({name}), and this process would use one",
            _MPI + read.BY_HAND,
        )
