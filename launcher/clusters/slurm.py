"""SLURM: one process for each task of a step, as `srun` starts them.

srun sets SLURM_JOB_ID, SLURM_STEP_ID, SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID, SLURM_GTIDS,
SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS and SLURM_STEP_TASKS_PER_NODE
(https://slurm.schedmd.com/srun.html, OUTPUT ENVIRONMENT VARIABLES) and slurmd adds
CUDA_VISIBLE_DEVICES or its ROCm equivalents where the job has GPUs
(https://slurm.schedmd.com/gres.html). A requeued job has SLURM_RESTART_COUNT
(https://slurm.schedmd.com/sbatch.html).

The shell of a job has no SLURM_STEP_ID, although that of sbatch has SLURM_PROCID=0 and all node
lists: without srun a program runs once in it, not once a task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from launcher.clusters import read
from launcher.clusters.hostlist import expand, expand_counts
from trainer.errors import UserError

# INTERACTIVE_STEP and BATCH_SCRIPT of slurm.h: steps that hold the job's shell. The first needs
# LaunchParameters=use_interactive_step.
_SHELLS = ("4294967290", "4294967291")
_NODELIST = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
_NUM_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")


class Slurm:
    """A task of a SLURM step."""

    name = "slurm"
    required = (("SLURM_JOB_ID",), ("SLURM_STEP_ID",), ("SLURM_PROCID",), _NODELIST, _NUM_TASKS)
    variables = (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_PROCID",
        *_NUM_TASKS,
        *_NODELIST,
        "SLURM_LOCALID",
        "SLURM_RESTART_COUNT",
    )
    hint = "srun python -m launcher ..., or --cluster=none to use this node only"

    @staticmethod
    def detect(env: Mapping[str, str]) -> bool:
        """Whether this is a task of a step; False in the shell of a job.

        Raises:
            UserError: a variable is missing.
        """
        if not env.get("SLURM_JOB_ID") or _is_shell(env):
            return False
        lack = read.missing(env, Slurm.required)
        if lack:
            raise UserError(f"in a SLURM step, but {', '.join(lack)} is not set", Slurm.hint)
        return True

    @staticmethod
    def refuse_shell(env: Mapping[str, str]) -> None:
        """Refuses to train as one task in the shell of a job of several.

        Raises:
            UserError: this is such a shell.
        """
        if env.get("SLURM_JOB_ID") and _is_shell(env):
            # Without --ntasks srun starts one task a node. SLURM_TASKS_PER_NODE does not say so:
            # with --exclusive it may be the number of cores.
            tasks = read.integer(env, "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", default=1)
            if tasks > 1:
                raise UserError(
                    f"SLURM has {tasks} tasks for this job, but srun is missing", Slurm.hint
                )

    @staticmethod
    def address(env: Mapping[str, str]) -> tuple[str, int]:
        """The node of rank 0, and a port derived from job and step.

        With the distributions block, cyclic and plane rank 0 runs on the first node of the step.
        With arbitrary (SLURM_HOSTFILE) the list of nodes is sorted, and no variable locates rank 0.
        The list of a heterogeneous job is sorted too, but rank 0 is in the first of its groups that
        takes part in the step.
        """
        nodes = expand(next(value for name in _NODELIST if (value := env.get(name))))
        if env.get("SLURM_DISTRIBUTION") == "arbitrary" and len(nodes) > 1:
            raise UserError(
                "with --distribution=arbitrary SLURM does not say where rank 0 is",
                f"srun --distribution=block, or set {read.COORDINATOR}=HOST:PORT",
            )
        groups = [
            host
            for i in range(read.integer(env, "SLURM_HET_SIZE", default=0))
            for host in expand(env.get(f"SLURM_JOB_NODELIST_HET_GROUP_{i}") or nodes[0])
        ]
        first = next((host for host in groups if host in nodes), nodes[0])
        # Up to 97 steps of a job, and jobs with close numbers, get different ports.
        number = 97 * read.integer(env, "SLURM_JOB_ID") + read.integer(env, "SLURM_STEP_ID")
        return first, read.port_of(number)

    @staticmethod
    def size(env: Mapping[str, str]) -> int:
        """The number of tasks of the step; SLURM_NTASKS may be that of the job."""
        return read.integer(env, *_NUM_TASKS)

    @staticmethod
    def rank(env: Mapping[str, str]) -> int:
        """SLURM_PROCID."""
        return read.integer(env, "SLURM_PROCID")

    @staticmethod
    def local_device_ids(env: Mapping[str, str]) -> tuple[int, ...] | None:
        """This task's share of the GPUs that it sees, unless it is bound to its own.

        Tasks are bound by --gpus-per-task (also as part of --tres-per-task), and by a --gpu-bind
        that gives each task its own. The numbers are checked, because --gpu-bind=none undoes it and
        old versions did not bind.
        """
        tasks = _tasks_on_node(env)
        local_rank = read.index(env, "SLURM_LOCALID", tasks, "tasks on this node", default=0)
        bound = (
            bool(env.get("SLURM_GPUS_PER_TASK"))
            or "gpu" in env.get("SLURM_TRES_PER_TASK", "")
            or bool(re.search("gpu:.*(per_task|single|map|mask)", env.get("SLURMD_TRES_BIND", "")))
        )
        on_node = read.integer(env, "SLURM_GPUS_ON_NODE", "PODLIFT_NUM_GPUS", default=0)
        visible = read.visible_devices(env)
        if visible is None:
            # Not set with --gpu-bind=none, and in a job that sees GPUs but has requested none.
            step = env.get("SLURM_STEP_GPUS")
            visible = len(step.split(",")) if step else on_node
        hint = "srun --gpus-per-task=N, or one task a node, which drives all its accelerators"
        return read.device_share(visible, on_node or None, tasks, local_rank, bound, hint)

    @staticmethod
    def attempt(env: Mapping[str, str]) -> int:
        """How often the job was requeued."""
        return read.integer(env, "SLURM_RESTART_COUNT", default=0, minimum=0)

    @staticmethod
    def job(env: Mapping[str, str]) -> str:
        """`slurm JOB.STEP`."""
        return f"slurm {env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"


def _is_shell(env: Mapping[str, str]) -> bool:
    return env.get("SLURM_STEP_ID", "") in ("", *_SHELLS)


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """The number of tasks of the step on this node."""
    # SLURM_STEP_TASKS_PER_NODE has the order of the sorted nodes, and SLURM_NODEID does not in
    # heterogeneous jobs; the global ids of this node's tasks are right everywhere.
    ids = env.get("SLURM_GTIDS")
    if ids:
        return len(ids.split(","))
    counts = env.get("SLURM_STEP_TASKS_PER_NODE")
    if not counts:
        return 1
    per_node = expand_counts(counts)
    return per_node[read.index(env, "SLURM_NODEID", len(per_node), "nodes", default=0)]
