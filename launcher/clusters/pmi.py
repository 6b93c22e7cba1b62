"""The place of rank 0, from the process manager that holds the other end of PMI_FD.

MPICH's Hydra, Intel MPI and Flux tell a process its rank and the number of ranks, but not where the
others are. MPI asks them over a socket, in lines of `key=value`, and so does this module: rank 0
stores its host name, all wait for each other, and all read it. The protocol is PMI-1,
https://flux-framework.readthedocs.io/projects/flux-rfc/en/latest/spec_13.html.
"""

from __future__ import annotations

import functools
import os
import platform
import stat
from collections.abc import Mapping

from launcher.clusters.launchers import PMI_HOST, PMI_JOB
from trainer.errors import UserError

_TIMEOUT_SECS = 300.0  # for all ranks to get here, as --rendezvous_timeout_secs


def read_pmi(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for `launcher.clusters.detect`, in addition to the environment's.

    Args:
        environ: environment variables.

    Returns:
        `pmi/host`, the host name of rank 0, and `pmi/kvsname`, which identifies the job; nothing
        for a job of one rank, or if PMI_FD is closed, as it is behind a program that starts another
        without its files.

    Raises:
        UserError: the process manager does not answer, or not as it should.
    """
    fd, rank = environ.get("PMI_FD", ""), environ.get("PMI_RANK", "")
    if not fd.isdecimal() or not rank.isdecimal() or environ.get("PMI_SIZE", "1").strip() == "1":
        return {}
    try:
        if not stat.S_ISSOCK(os.fstat(int(fd)).st_mode):
            return {}
    except OSError:
        return {}
    # MPICH 5 sets the name under which it knows this machine.
    return dict(_exchange(int(fd), rank == "0", environ.get("PMI_HOSTNAME") or platform.node()))


@functools.cache  # a process may say hello only once, and a sweep asks for each of its runs
def _exchange(fd: int, first: bool, host: str) -> tuple[tuple[str, str], ...]:
    import socket

    def ask(line: str) -> dict[str, str]:
        lines.write(f"{line}\n".encode())
        lines.flush()
        answer = lines.readline().decode()
        found = dict(part.split("=", 1) for part in answer.split() if "=" in part)
        if found.get("rc", "0") != "0" or not found:
            raise OSError(f"{line} is answered by {answer.strip()!r}")
        return found

    try:
        with socket.socket(fileno=os.dup(fd)) as connection:
            connection.settimeout(_TIMEOUT_SECS)
            with connection.makefile("rwb") as lines:
                ask("cmd=init pmi_version=1 pmi_subversion=1")
                job = ask("cmd=get_my_kvsname")["kvsname"]
                if first:
                    ask(f"cmd=put kvsname={job} key=podlift_host value={host}")
                ask("cmd=barrier_in")
                found = ask(f"cmd=get kvsname={job} key=podlift_host")["value"]
                ask("cmd=finalize")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"PMI_FD={fd}: the process manager does not say where rank 0 is: {error}",
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=RANK",
        ) from error
    return ((PMI_HOST, found), (PMI_JOB, job))
