"""The launchers that `ranks.Ranks` describes, one row of names each.

Launchers of one process a device give a local rank, launchers of one process a machine do not. The
sources of the names:

    TORCHRUN    https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables";
                accelerate, Composer and Ray Train set the same; deepspeed says LOCAL_SIZE
                (https://github.com/deepspeedai/DeepSpeed, deepspeed/launcher/launch.py)
    HOROVOD     https://github.com/horovod/horovod, horovod/runner/gloo_run.py
    JSRUN       https://www.ibm.com/docs/en/spectrum-lsf, Job Step Manager
    FLUX        https://flux-framework.readthedocs.io, flux-environment(7)
    HYDRA       MPICH 5.0 and Intel MPI 2021.19, which set the same; PMI_FD is described in
                https://flux-framework.readthedocs.io/projects/flux-rfc/en/latest/spec_13.html
    MVAPICH     https://mvapich.cse.ohio-state.edu/userguide/, MV2_COMM_WORLD_*
    PMI         the same document as HYDRA; Cray PALS sets PMI_LOCAL_*
                (https://cpe.ext.hpe.com/docs/latest/pals/, mpiexec)
    TORCH_ENV   https://docs.pytorch.org/docs/stable/distributed.html, "Environment variable
                initialization"; Azure ML sets it (https://learn.microsoft.com/azure/
                machine-learning/how-to-train-distributed-gpu), and Volcano's pytorch plugin
    KUBEFLOW    https://www.kubeflow.org/docs/components/trainer/user-guides/pytorch/ and
                https://github.com/kubeflow/training-operator, PyTorchJob; torchrun reads PET_*
    JAX         https://www.kubeflow.org/docs/components/trainer/user-guides/jax/;
                `jax.distributed.initialize` itself reads JAX_COORDINATOR_ADDRESS
    JAX_JOB     https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/jax/
    LWS         https://lws.sigs.k8s.io/docs/reference/labels-annotations-and-environment-variables/
    SKYPILOT    https://docs.skypilot.co/en/stable/running-jobs/environment-variables.html
    DSTACK      https://dstack.ai/docs/concepts/tasks/, distributed tasks
    METAFLOW    https://github.com/Netflix/metaflow, metaflow/plugins/parallel_decorator.py
    BEAKER      https://beaker-docs.apps.allenai.org, distributed training
    AWS_BATCH   https://docs.aws.amazon.com/batch/latest/userguide/mnp-env-vars.html and
                https://docs.aws.amazon.com/batch/latest/userguide/job_env_vars.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from launcher.clusters import read
from launcher.clusters.ranks import Ranks
from trainer.errors import UserError

PMI_HOST, PMI_JOB = "pmi/host", "pmi/kvsname"  # from `pmi.read_pmi`

TORCH_ENV = Ranks(
    "torch_env",
    rank_names=("RANK",),
    size_names=("WORLD_SIZE",),
    address_names=("MASTER_ADDR",),
    port_names=("MASTER_PORT",),
    local_rank_names=("LOCAL_RANK",),
    nodes_names=("AZUREML_NODE_COUNT",),
    # torchrun's own store may listen at MASTER_PORT, so the port is derived from it.
    job_names=("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"),
    attempt_names=("TORCHELASTIC_RESTART_COUNT",),
)
TORCHRUN = replace(
    TORCH_ENV,
    name="torchrun",
    marker_names=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    local_size_names=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    nodes_names=(),
)
HOROVOD = Ranks(
    "horovod",  # its rendezvous is where horovodrun runs, which need not be rank 0's machine
    rank_names=("HOROVOD_RANK",),
    size_names=("HOROVOD_SIZE",),
    local_rank_names=("HOROVOD_LOCAL_RANK",),
    local_size_names=("HOROVOD_LOCAL_SIZE",),
    job_names=("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"),
)
JSRUN = Ranks(
    "jsrun",
    rank_names=("JSM_NAMESPACE_RANK",),
    size_names=("JSM_NAMESPACE_SIZE",),
    local_rank_names=("JSM_NAMESPACE_LOCAL_RANK",),
    local_size_names=("JSM_NAMESPACE_LOCAL_SIZE",),
    job_names=("LSB_JOBID", "PMIX_NAMESPACE"),
)
FLUX = Ranks(
    "flux",
    rank_names=("FLUX_TASK_RANK",),
    size_names=("FLUX_JOB_SIZE",),
    address_names=(PMI_HOST,),
    local_rank_names=("FLUX_TASK_LOCAL_ID",),
    nodes_names=("FLUX_JOB_NNODES",),
    job_names=("FLUX_JOB_ID",),
)
HYDRA = Ranks(
    "hydra",
    rank_names=("PMI_RANK",),
    size_names=("PMI_SIZE",),
    address_names=(PMI_HOST,),
    marker_names=("MPI_LOCALNRANKS",),
    local_rank_names=("MPI_LOCALRANKID",),
    local_size_names=("MPI_LOCALNRANKS",),
    job_names=(PMI_HOST, PMI_JOB),
)
MVAPICH = Ranks(
    "mvapich",
    rank_names=("MV2_COMM_WORLD_RANK",),
    size_names=("MV2_COMM_WORLD_SIZE",),
    local_rank_names=("MV2_COMM_WORLD_LOCAL_RANK",),
    local_size_names=("MV2_COMM_WORLD_LOCAL_SIZE",),
)
PMI = Ranks(
    "pmi",
    rank_names=("PMI_RANK",),
    size_names=("PMI_SIZE",),
    address_names=(PMI_HOST,),
    local_rank_names=("PMI_LOCAL_RANK",),
    local_size_names=("PMI_LOCAL_SIZE",),
    job_names=(PMI_HOST, PMI_JOB),
)
KUBEFLOW = Ranks(
    "kubeflow",
    rank_names=("PET_NODE_RANK",),
    size_names=("PET_NNODES",),
    address_names=("PET_MASTER_ADDR", "MASTER_ADDR"),
)
JAX = Ranks(
    "jax",
    rank_names=("JAX_PROCESS_ID", "JAX_PROCESS_INDEX"),
    size_names=("JAX_NUM_PROCESSES", "JAX_PROCESS_COUNT"),
    address_names=("JAX_COORDINATOR_ADDRESS",),
    listens=False,
)
JAX_JOB = Ranks(
    "jax_job",
    rank_names=("PROCESS_ID",),
    size_names=("NUM_PROCESSES",),
    address_names=("COORDINATOR_ADDRESS",),
    port_names=("COORDINATOR_PORT",),
    marker_names=("COORDINATOR_ADDRESS",),
    listens=False,
)
LWS = Ranks(
    "leader_worker_set",
    rank_names=("LWS_WORKER_INDEX",),
    size_names=("LWS_GROUP_SIZE",),
    address_names=("LWS_LEADER_ADDRESS",),
)
SKYPILOT = Ranks(
    "skypilot",
    rank_names=("SKYPILOT_NODE_RANK",),
    size_names=("SKYPILOT_NUM_NODES",),
    address_names=("SKYPILOT_NODE_IPS",),
    job_names=("SKYPILOT_TASK_ID",),
)
DSTACK = Ranks(
    "dstack",
    rank_names=("DSTACK_NODE_RANK",),
    size_names=("DSTACK_NODES_NUM",),
    address_names=("DSTACK_MASTER_NODE_IP",),
)
METAFLOW = Ranks(
    "metaflow",
    rank_names=("MF_PARALLEL_NODE_INDEX",),
    size_names=("MF_PARALLEL_NUM_NODES",),
    address_names=("MF_PARALLEL_MAIN_IP",),
)
BEAKER = Ranks(
    "beaker",
    rank_names=("BEAKER_REPLICA_RANK",),
    size_names=("BEAKER_REPLICA_COUNT",),
    address_names=("BEAKER_LEADER_REPLICA_HOSTNAME",),
)


class _AwsBatch(Ranks):
    """Rank 0 is the main node, which may have any index and is not told its own address."""

    def rank(self, env: Mapping[str, str]) -> int:
        """Counts from the main node on."""
        size = self.size(env)
        index = read.index(env, self.rank_names[0], size, "nodes")
        return (index - read.integer(env, "AWS_BATCH_JOB_MAIN_NODE_INDEX", default=0)) % size

    def address(self, env: Mapping[str, str]) -> tuple[str, int]:
        """On the main node, its own host name."""
        if self.rank(env) == 0 and self.size(env) > 1:
            host = env.get("HOSTNAME")
            if not host:
                raise UserError("on the main node HOSTNAME is not set", read.SET_COORDINATOR)
            env = {**env, self.address_names[0]: host}
        return super().address(env)

    def attempt(self, env: Mapping[str, str]) -> int:
        """AWS_BATCH_JOB_ATTEMPT counts from 1."""
        return read.integer(env, *self.attempt_names, default=1, minimum=1) - 1

    def _identity(self, env: Mapping[str, str]) -> str:
        # The node's index follows the id of the job.
        return super()._identity(env).partition("#")[0]


AWS_BATCH = _AwsBatch(
    "aws_batch",
    rank_names=("AWS_BATCH_JOB_NODE_INDEX",),
    size_names=("AWS_BATCH_JOB_NUM_NODES",),
    address_names=("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS",),
    job_names=("AWS_BATCH_JOB_ID",),
    attempt_names=("AWS_BATCH_JOB_ATTEMPT",),
)
