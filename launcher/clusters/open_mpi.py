"""Open MPI: one process for each rank that `mpirun` starts.

mpirun sets OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_LOCAL_RANK and
OMPI_COMM_WORLD_LOCAL_SIZE
(https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html), and up to version 4
OMPI_MCA_orte_hnp_uri, the address of mpirun itself. From version 5 on it sets PMIX_NAMESPACE, the
name of the job, and PMIX_SERVER_URI*, the daemon of this machine, mostly at 127.0.0.1, which is of
no use to the other ranks.

With the default mapping rank 0 runs where mpirun runs, if mpirun was started on the first of the
hosts. Inside a SLURM job that may not be so (salloc on a login node), but rank 0 runs on the first
node of the job. Everywhere else scripts/mpi.sh sets PODLIFT_COORDINATOR_ADDRESS.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from launcher.clusters import read
from launcher.clusters.hostlist import expand
from trainer.errors import UserError

_HNP = "OMPI_MCA_orte_hnp_uri"


class OpenMpi:
    """A rank of an Open MPI job. Checked before SLURM, in whose jobs mpirun runs too.

    Inside a SLURM job, SLURM's variables describe the daemons of mpirun, one a node, not the ranks.
    """

    name = "open_mpi"
    required = (("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_RANK",))
    variables = (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        _HNP,
        "PMIX_NAMESPACE",
        "SLURM_JOB_NODELIST",
        "SLURM_RESTART_COUNT",
    )
    hint = "mpirun -n N python -m launcher ..."

    @staticmethod
    def detect(env: Mapping[str, str]) -> bool:
        """Whether mpirun started this process."""
        return not read.missing(env, OpenMpi.required)

    @staticmethod
    def address(env: Mapping[str, str]) -> tuple[str, int]:
        """127.0.0.1 if all ranks are on this machine, otherwise as described above.

        Raises:
            UserError: the ranks are on several machines, and no variable locates rank 0.
        """
        # Not `hash`, which differs between processes.
        port = read.port_of(zlib.crc32(_job_id(env).encode()))
        if _local_size(env) == OpenMpi.size(env):
            return "127.0.0.1", port
        if env.get("SLURM_JOB_NODELIST"):
            return expand(env["SLURM_JOB_NODELIST"])[0], port
        for host in hnp_hosts(env.get(_HNP, "")):
            if not host.startswith("127.") and host != "::1":
                return host, port
        raise UserError(
            "Open MPI does not say on which of several machines rank 0 is",
            f"--coordinator_address=HOST:PORT, or mpirun -x {read.COORDINATOR}=HOST:PORT",
        )

    @staticmethod
    def size(env: Mapping[str, str]) -> int:
        """OMPI_COMM_WORLD_SIZE."""
        return read.integer(env, "OMPI_COMM_WORLD_SIZE")

    @staticmethod
    def rank(env: Mapping[str, str]) -> int:
        """OMPI_COMM_WORLD_RANK."""
        return read.integer(env, "OMPI_COMM_WORLD_RANK")

    @staticmethod
    def local_device_ids(env: Mapping[str, str]) -> tuple[int, ...] | None:
        """This rank's share of the GPUs that it sees; mpirun does not bind them."""
        tasks = _local_size(env)
        local_rank = read.index(
            env, "OMPI_COMM_WORLD_LOCAL_RANK", tasks, "ranks on this machine", default=0
        )
        hint = "mpirun --map-by ppr:1:node, or a number of ranks that divides the accelerators"
        return read.unbound_share(env, tasks, local_rank, hint)

    @staticmethod
    def attempt(env: Mapping[str, str]) -> int:
        """How often the SLURM job around it was requeued; mpirun itself restarts nothing."""
        return read.integer(env, "SLURM_RESTART_COUNT", default=0, minimum=0)

    @staticmethod
    def job(env: Mapping[str, str]) -> str:
        """`open_mpi ID`: the number of mpirun or the namespace of PMIx."""
        return f"open_mpi {_job_id(env)}"


def hnp_hosts(uri: str) -> list[str]:
    """The addresses in OMPI_MCA_orte_hnp_uri, in order.

    Args:
        uri: such as `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911;tcp6://[fd00::2]:55217`. Old
            versions write a `tcp://` for each address.
    """
    hosts = re.findall(r"tcp[46]?://\[?([0-9A-Fa-f.:%\w,]+?)\]?:[0-9]+(?=;|$)", uri)
    return [host for group in hosts for host in group.split(",")]


def _local_size(env: Mapping[str, str]) -> int:
    return read.integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE", default=1, minimum=1)


def _job_id(env: Mapping[str, str]) -> str:
    """An id that all ranks of one mpirun share, and no other mpirun has."""
    number = env.get(_HNP, "").partition(";")[0].partition(".")[0]
    name = number or env.get("PMIX_NAMESPACE") or env.get(read.COORDINATOR)
    if not name:
        raise UserError(
            f"Open MPI has set neither {_HNP} nor PMIX_NAMESPACE",
            f"--coordinator_address=HOST:PORT, or mpirun -x {read.COORDINATOR}=HOST:PORT",
        )
    return name
