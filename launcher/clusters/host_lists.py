"""Platforms that give each process the list of all hosts, and its own place in it.

The list is JSON, or separated by commas. Rank 0 runs on the first host.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.clusters import read
from trainer.errors import UserError


class _HostList(ABC):
    """What the platforms share: one process a host, in the order of the list."""

    name = ""
    required: tuple[tuple[str, ...], ...] = ()
    variables: tuple[str, ...] = ()
    hint = read.BY_HAND

    @classmethod
    @abstractmethod
    def place(cls, env: Mapping[str, str]) -> tuple[list[str], int]:
        """The hosts, with or without ports, and the index of this process among them."""

    @classmethod
    def detect(cls, env: Mapping[str, str]) -> bool:
        """Whether there is such a list."""
        return not read.missing(env, cls.required)

    @classmethod
    def address(cls, env: Mapping[str, str]) -> tuple[str, int]:
        """The first host. At the port of the list only the processes themselves would listen."""
        hosts = cls.place(env)[0]
        return read.parse_address(hosts[0], cls.required[0][0], read.DEFAULT_PORT)

    @classmethod
    def size(cls, env: Mapping[str, str]) -> int:
        """The number of hosts."""
        return len(cls.place(env)[0])

    @classmethod
    def rank(cls, env: Mapping[str, str]) -> int:
        """The index of this host."""
        return cls.place(env)[1]

    @classmethod
    def local_device_ids(cls, env: Mapping[str, str]) -> None:
        """None: one process a host."""
        return None

    @classmethod
    def attempt(cls, env: Mapping[str, str]) -> int:
        """PODLIFT_RESTART_ATTEMPT, if somebody sets it."""
        return read.integer(env, "PODLIFT_RESTART_ATTEMPT", default=0, minimum=0)

    @classmethod
    def job(cls, env: Mapping[str, str]) -> str:
        """`NAME HOST:PORT`, of rank 0."""
        return f"{cls.name} {env.get(read.COORDINATOR) or ':'.join(map(str, cls.address(env)))}"


class _TaskPools(_HostList):
    """JSON of a cluster as pools of hosts, and of this process as a pool and an index in it."""

    @classmethod
    @abstractmethod
    def ranked(cls, pools: Mapping[str, Any]) -> list[str]:
        """The pools whose hosts train, that of rank 0 first.

        Raises:
            UserError: there are pools that podlift has no use for.
        """

    @classmethod
    def detect(cls, env: Mapping[str, str]) -> bool:
        """Whether the JSON has a cluster; `{}` is what a job of one process gets."""
        return super().detect(env) and bool(cls._read(env)[0])

    @classmethod
    def place(cls, env: Mapping[str, str]) -> tuple[list[str], int]:
        """The hosts of all pools, and the index of this process among them."""
        pools, task = cls._read(env)
        names = cls.ranked(pools)
        hosts = [str(host) for name in names for host in pools[name]]
        pool, index = str(task.get("type")), str(task.get("index", 0))
        if pool not in names or not index.isdecimal() or int(index) >= len(pools[pool]):
            raise UserError(
                f"{cls.required[0][0]} has no task {pool} {index} among those that train "
                f"({', '.join(names) or 'none'})",
                read.BY_HAND,
            )
        return hosts, sum(len(pools[name]) for name in names[: names.index(pool)]) + int(index)

    @classmethod
    def _read(cls, env: Mapping[str, str]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        name = cls.required[0][0]
        try:
            found = json.loads(env[name])
            pools = {pool: list(hosts) for pool, hosts in found.get("cluster", {}).items() if hosts}
            return pools, dict(found.get("task") or {})
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{name} is not the JSON of a cluster", f"unset {name}, or {read.BY_HAND}"
            ) from None


class TfConfig(_TaskPools):
    """TF_CONFIG, as Kubeflow's TFJob and others set it.

    https://www.tensorflow.org/guide/distributed_training#setting_up_the_tf_config_environment_variable
    """

    name = "tf_config"
    required = (("TF_CONFIG",),)
    variables = ("TF_CONFIG",)

    @classmethod
    def ranked(cls, pools: Mapping[str, Any]) -> list[str]:
        """The chief, then the workers."""
        names = [name for name in ("chief", "master", "worker") if name in pools]
        others = sorted(pools.keys() - set(names))
        if others:
            raise UserError(
                f"TF_CONFIG has tasks of type {', '.join(others)}, which podlift does not have",
                "a chief and workers, or workers alone",
            )
        return names


class Vertex(_TaskPools):
    """CLUSTER_SPEC of Vertex AI.

    Pool 0 has the primary replica and pool 1 the workers; pools 2 and 3 are for parameter servers
    and evaluators (https://cloud.google.com/vertex-ai/docs/training/distributed-training).
    """

    name = "vertex"
    required = (("CLUSTER_SPEC",),)
    variables = ("CLUSTER_SPEC",)

    @classmethod
    def ranked(cls, pools: Mapping[str, Any]) -> list[str]:
        """Pools 0 and 1."""
        return [name for name in ("workerpool0", "workerpool1") if name in pools]


class SageMaker(_HostList):
    """SM_HOSTS of SageMaker's training toolkit, in the order that is the same on all hosts.

    https://github.com/aws/sagemaker-training-toolkit/blob/master/ENVIRONMENT_VARIABLES.md
    """

    name = "sagemaker"
    required = (("SM_HOSTS",), ("SM_CURRENT_HOST",))
    variables = ("SM_HOSTS", "SM_CURRENT_HOST")

    @classmethod
    def place(cls, env: Mapping[str, str]) -> tuple[list[str], int]:
        """The hosts, and the index of SM_CURRENT_HOST."""
        try:
            hosts = [str(host) for host in json.loads(env["SM_HOSTS"])]
            return hosts, hosts.index(env["SM_CURRENT_HOST"])
        except (ValueError, TypeError):
            raise UserError(
                f"SM_HOSTS={env['SM_HOSTS']} is not a list that has "
                f"SM_CURRENT_HOST={env['SM_CURRENT_HOST']}",
                read.BY_HAND,
            ) from None


def read_resource_config(
    environ: Mapping[str, str], path: Path = Path("/opt/ml/input/config/resourceconfig.json")
) -> dict[str, str]:
    """SM_HOSTS and SM_CURRENT_HOST in a container of SageMaker without its training toolkit.

    https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html

    Args:
        environ: environment variables.
        path: where SageMaker writes them.

    Raises:
        UserError: the file is not what SageMaker writes.
    """
    if not environ.get("TRAINING_JOB_NAME") or environ.get("SM_HOSTS"):
        return {}
    try:
        found = json.loads(path.read_text())
        return {"SM_HOSTS": json.dumps(found["hosts"]), "SM_CURRENT_HOST": found["current_host"]}
    except OSError:
        return {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} does not say which hosts there are", read.BY_HAND) from error


class Volcano(_HostList):
    """VC_TASK_INDEX and VC_*_HOSTS of the plugins env and svc of Volcano.

    https://github.com/volcano-sh/volcano/blob/master/docs/user-guide/how_to_use_svc_plugin.md
    """

    name = "volcano"
    required = (("VC_TASK_INDEX", "VK_TASK_INDEX"),)
    variables = ("VC_TASK_INDEX", "VK_TASK_INDEX")
    hint = "plugins: {env: [], svc: []} in the Volcano job; or " + read.BY_HAND

    @classmethod
    def detect(cls, env: Mapping[str, str]) -> bool:
        """Whether the variables of both plugins are there."""
        return super().detect(env) and bool(cls._lists(env))

    @classmethod
    def place(cls, env: Mapping[str, str]) -> tuple[list[str], int]:
        """The hosts of the only task, and the index of this pod.

        Raises:
            UserError: the job has several tasks: a pod does not learn of which it is.
        """
        lists = cls._lists(env)
        if len(lists) > 1:
            raise UserError(
                f"Volcano has several tasks ({', '.join(lists)}), and does not say of which this "
                "pod is",
                f"one task for all pods, or {read.BY_HAND}",
            )
        hosts = [host.strip() for host in env[lists[0]].split(",") if host.strip()]
        return hosts, read.index(env, cls._index_name(env), len(hosts), f"hosts in {lists[0]}")

    @staticmethod
    def _index_name(env: Mapping[str, str]) -> str:
        return next(name for name in Volcano.required[0] if env.get(name))

    @staticmethod
    def _lists(env: Mapping[str, str]) -> list[str]:
        return sorted(
            name
            for name in env
            if name.startswith("VC_") and name.endswith("_HOSTS") and env[name].strip()
        )
