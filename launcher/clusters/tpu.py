"""Cloud TPU: one process for each host of a slice, or of several (multislice).

On GKE a webhook sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES in each pod that asks for TPUs
(https://cloud.google.com/kubernetes-engine/docs/how-to/tpus); TPU_PROCESS_ADDRESSES, the same with
ports, takes precedence. Notebooks with one TPU host set TPU_WORKER_HOSTNAMES=localhost.

On Compute Engine the metadata server has `agent-worker-number`, `worker-network-endpoints` and
`tpu-env` (https://cloud.google.com/tpu/docs/tpus). `launcher.clusters.gce_metadata` adds them to
the variables, under names that begin with `gce/`.

Multislice adds MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID
(https://cloud.google.com/tpu/docs/multislice-introduction), as variables or in `tpu-env`; variables
take precedence. The lists of hosts are then those of one slice. The coordinator is host 0 of
slice 0.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

from launcher.clusters import read
from trainer.errors import UserError

_MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
_SHARED = (*_MEGASCALE, "PODLIFT_JOB_NAME", "PODLIFT_RESTART_ATTEMPT")


class _Tpu(ABC):
    """The common part of GKE and Compute Engine."""

    name = ""
    worker_id = ""
    required: tuple[tuple[str, ...], ...] = ()

    @classmethod
    @abstractmethod
    def hosts(cls, env: Mapping[str, str]) -> list[str]:
        """The hosts of this slice, by worker id."""

    @classmethod
    def detect(cls, env: Mapping[str, str]) -> bool:
        """Whether this is a host of a TPU slice."""
        return not read.missing(env, cls.required)

    @classmethod
    def address(cls, env: Mapping[str, str]) -> tuple[str, int]:
        """Host 0 of slice 0.

        Raises:
            UserError: there are several slices and no MEGASCALE_COORDINATOR_ADDRESS.
        """
        coordinator = _megascale(env).get(_MEGASCALE[0])
        if coordinator:
            host = read.parse_address(coordinator, _MEGASCALE[0], read.DEFAULT_PORT)[0]
        elif _num_slices(env) > 1:
            raise UserError(
                f"{_MEGASCALE[1]}={_num_slices(env)}, but {_MEGASCALE[0]} is not set",
                f"set it, or {read.COORDINATOR}=HOST:PORT, to host 0 of slice 0",
            )
        else:
            host = cls.hosts(env)[0]
        # libtpu listens on the ports of TPU_PROCESS_ADDRESSES, often 8476 where several processes
        # share a host. All hosts see the same list.
        taken = {_port(entry) for entry in env.get("TPU_PROCESS_ADDRESSES", "").split(",")}
        port = next(i for i in range(read.DEFAULT_PORT, 65536) if i not in taken)
        return host, port

    @classmethod
    def size(cls, env: Mapping[str, str]) -> int:
        """The number of hosts in all slices, which have equal sizes."""
        return _num_slices(env) * len(cls.hosts(env))

    @classmethod
    def rank(cls, env: Mapping[str, str]) -> int:
        """Counts the hosts of slice 0 first."""
        hosts = len(cls.hosts(env))
        worker = read.index(env, cls.worker_id, hosts, "hosts in the slice")
        slices = _num_slices(env)
        return hosts * read.index(_megascale(env), _MEGASCALE[2], slices, "slices", 0) + worker

    @classmethod
    def local_device_ids(cls, env: Mapping[str, str]) -> None:
        """None: libtpu assigns a process its chips."""
        return None

    @classmethod
    def attempt(cls, env: Mapping[str, str]) -> int:
        """How often the JobSet was restarted."""
        return read.integer(env, "PODLIFT_RESTART_ATTEMPT", default=0, minimum=0)

    @classmethod
    def job(cls, env: Mapping[str, str]) -> str:
        """Its name, or else its first host, which two jobs after each other share."""
        name = env.get("PODLIFT_JOB_NAME") or env.get(read.COORDINATOR)
        return f"{cls.name} {name or cls.address(env)[0]}"


class TpuGke(_Tpu):
    """A pod with TPUs. Checked before plain Kubernetes."""

    name = "tpu_gke"
    worker_id = "TPU_WORKER_ID"
    required = (("TPU_WORKER_ID",), ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"))
    variables = ("TPU_WORKER_ID", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES", *_SHARED)
    hint = (
        "GKE sets them in pods of an Indexed Job that has a subdomain and asks for google.com/tpu"
    )

    @classmethod
    def hosts(cls, env: Mapping[str, str]) -> list[str]:
        """The hosts of this slice, by worker id."""
        name = next(name for name in cls.required[1] if env.get(name))
        return [
            read.parse_address(host, name, read.DEFAULT_PORT)[0] for host in env[name].split(",")
        ]


class TpuGce(_Tpu):
    """A TPU VM."""

    name = "tpu_gce"
    worker_id = "gce/agent-worker-number"
    required = (("gce/agent-worker-number",), ("gce/worker-network-endpoints",))
    variables = (
        "gce/agent-worker-number",
        "gce/worker-network-endpoints",
        "gce/tpu-env",
        *_SHARED,
    )
    hint = "run on the hosts of a TPU VM that can reach the metadata server"

    @classmethod
    def hosts(cls, env: Mapping[str, str]) -> list[str]:
        """The hosts of this slice, by worker id.

        Raises:
            UserError: the endpoints are neither host names nor `name:id:ip` (the old format).
        """
        hosts = []
        for endpoint in env["gce/worker-network-endpoints"].strip().split(","):
            parts = endpoint.split(":")
            if len(parts) not in (1, 3) or not parts[-1]:
                raise UserError(f"worker-network-endpoints holds {endpoint!r}, not a host")
            hosts.append(parts[-1])
        return hosts


def _megascale(env: Mapping[str, str]) -> dict[str, str]:
    """The MEGASCALE_* that are set, in `gce/tpu-env` (lines `KEY: 'value'`) or as variables."""
    lines = re.findall(
        r"^[ \t]*(\w+)[ \t]*:[ \t]*'?(.*?)'?[ \t\r]*$", env.get("gce/tpu-env", ""), re.MULTILINE
    )
    values = dict(lines) | {name: env[name] for name in _MEGASCALE if env.get(name)}
    return {name: values[name] for name in _MEGASCALE if values.get(name)}


def _num_slices(env: Mapping[str, str]) -> int:
    return read.integer(_megascale(env), _MEGASCALE[1], default=1, minimum=1)


def _port(entry: str) -> int | None:
    try:
        return read.split_address(entry.strip())[1]
    except ValueError:
        return None
