"""Every recorded environment gives its placement, or an error that says why not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from recorded_environ import RECORDED, changed, recorded

from launcher.clusters.detect import CLUSTERS, detect
from trainer.errors import UserError

SKYPILOT_TASK = "sky-2026-11-29-18-24-50-000000_mlp_7"
TORCH_RUNS = ("d97f3def-f048-46f2-91ee-d2350303505e", "d3095231-62b2-4691-a3d5-5effe0c2f399")
VERTEX_HOST = "cmle-training-workerpool0-ab-0"
MEGASCALE_HOST = "multislice-job-slice-0-0.multislice-job"

# What rank 0 answers over PMI_FD, and the lines of PBS_NODEFILE, are in the recordings too.
# file: host, port, processes, rank, devices, attempt, job (after the cluster, which is the file's)
PLACEMENTS = {
    "kubernetes-job-pod1": ("train-0.svc", 8476, 2, 1, None, 0, "train-0.svc"),
    "kubernetes-jobset-gpu-job1-pod0": ("gpus-workers-0-0.gpus", 9000, 4, 2, None, 2, "gpus"),
    "open_mpi-1-rank0": ("127.0.0.1", 23078, 1, 0, None, 0, "2096627712"),
    "open_mpi-2-rank0": ("127.0.0.1", 24374, 2, 0, None, 0, "2096103424"),
    "open_mpi-2-rank1": ("127.0.0.1", 24374, 2, 1, None, 0, "2096103424"),
    "open_mpi-4-rank0": ("127.0.0.1", 20511, 4, 0, None, 0, "2095316992"),
    "open_mpi-4-rank3": ("127.0.0.1", 20511, 4, 3, None, 0, "2095316992"),
    "open_mpi-5-one_machine-rank1": ("127.0.0.1", 28946, 2, 1, None, 0, "prterun-n1-4711@1"),
    "open_mpi-slurm-2n4t-rank0": ("n1", 28317, 4, 0, None, 0, "1917190144"),
    "open_mpi-slurm-2n4t-rank3": ("n1", 28317, 4, 3, None, 0, "1917190144"),
    "slurm-1n1t-rank0": ("n1", 20097, 1, 0, None, 0, "1.0"),
    "slurm-1n4t-rank0": ("n1", 20194, 4, 0, None, 0, "2.0"),
    "slurm-1n4t-rank3": ("n1", 20194, 4, 3, None, 0, "2.0"),
    "slurm-2n3t-rank0": ("n1", 20485, 3, 0, None, 0, "5.0"),
    "slurm-2n3t-rank1": ("n1", 20485, 3, 1, None, 0, "5.0"),
    "slurm-2n3t-rank2": ("n1", 20485, 3, 2, None, 0, "5.0"),
    "slurm-2n4t-rank0": ("n1", 20291, 4, 0, None, 0, "3.0"),
    "slurm-2n4t-rank2": ("n1", 20291, 4, 2, None, 0, "3.0"),
    "slurm-2n4t-rank3": ("n1", 20291, 4, 3, None, 0, "3.0"),
    "slurm-4n4t-rank0": ("n1", 20388, 4, 0, None, 0, "4.0"),
    "slurm-4n4t-rank3": ("n1", 20388, 4, 3, None, 0, "4.0"),
    "slurm-cyclic-rank0": ("n1", 21358, 4, 0, None, 0, "14.0"),
    "slurm-cyclic-rank1": ("n1", 21358, 4, 1, None, 0, "14.0"),
    "slurm-plane-rank1": ("n1", 21261, 4, 1, None, 0, "13.0"),
    # Rank 0 is on n3, though the node list says n[1,3].
    "slurm-het-rank0": ("n3", 20388, 3, 0, None, 0, "4.0"),
    "slurm-het-rank2": ("n3", 20388, 3, 2, None, 0, "4.0"),
    "slurm-restarted-rank1": ("n1", 22425, 2, 1, None, 1, "25.0"),
    "slurm-gres-rank2": ("n1", 20679, 4, 2, (2,), 0, "7.0"),
    "slurm-gres-2n-rank3": ("n1", 20873, 4, 3, (2, 3), 0, "9.0"),
    "slurm-gpu-bind-closest-rank1": ("n1", 21067, 2, 1, (2, 3), 0, "11.0"),
    "slurm-gpu-bind-none-rank1": ("n1", 21164, 2, 1, (2, 3), 0, "12.0"),
    "slurm-gpu-bind-single-rank3": ("n1", 20970, 4, 3, None, 0, "10.0"),
    "slurm-gpus-8-rank1": ("n1", 21455, 2, 1, None, 0, "15.0"),
    "slurm-gpus-per-task-1-cgroup-rank2": ("n1", 29055, 4, 2, None, 0, "815.0"),
    "slurm-gpus-per-task-1-rank2": ("n1", 20582, 4, 2, None, 0, "6.0"),
    "slurm-gpus-per-task-2-rank3": ("n1", 20776, 4, 3, None, 0, "8.0"),
    "tpu_gce-multislice-slice1-worker0": ("10.130.0.11", 8476, 4, 2, None, 0, "10.130.0.11"),
    "tpu_gce-v4-32-worker3": ("10.130.0.11", 8476, 4, 3, None, 0, "10.130.0.11"),
    "tpu_gke-multislice-slice1-worker1": (MEGASCALE_HOST, 8476, 4, 3, None, 1, MEGASCALE_HOST),
    "tpu_gke-notebook": ("localhost", 8476, 1, 0, None, 0, "localhost"),
    "tpu_gke-v5e-16-worker2": (
        "train-0.headless-svc",
        8476,
        4,
        2,
        None,
        0,
        "train-0.headless-svc",
    ),
    "aws_batch-child-node0": ("10.0.1.5", 20735, 3, 2, None, 1, "5f3c-77"),
    "aws_batch-main-node1": ("ip-10-0-1-5.ec2.internal", 20735, 3, 0, None, 1, "5f3c-77"),
    "beaker-replica1": ("jupiter-cs-aus-101", 8476, 2, 1, None, 0, "jupiter-cs-aus-101:8476"),
    "dstack-node1": ("10.0.0.4", 8476, 2, 1, None, 0, "10.0.0.4:8476"),
    "flux-1n2t-rank1": ("127.0.0.1", 24843, 2, 1, None, 0, "f3ETxsR9H"),
    "flux-2n4t-rank3": ("n1", 24843, 4, 3, None, 0, "f3ETxsR9H"),
    "horovod-2-rank1": ("127.0.0.1", 25926, 2, 1, None, 0, "10.0.0.4 40217"),
    "hydra-intel-2-rank0": ("127.0.0.1", 22068, 2, 0, None, 0, "n1 kvs_16733_0"),
    "hydra-mpich-1-rank0": ("127.0.0.1", 8476, 1, 0, None, 0, "127.0.0.1:8476"),
    "hydra-mpich-2-rank1": ("127.0.0.1", 24357, 2, 1, None, 0, "n1 kvs_16628_0_687554383_n1"),
    "hydra-slurm-2n4t-rank3": ("n1", 27460, 4, 3, None, 0, "n1 kvs_711_0_42_n1"),
    "jax-by_hand-rank0": ("127.0.0.1", 12355, 2, 0, None, 0, "127.0.0.1:12355"),
    "jax-trainer-node1": ("mlp-node-0-0.mlp", 6666, 2, 1, None, 0, "mlp-node-0-0.mlp:6666"),
    "jax_job-worker1": ("mlp-worker-0", 6666, 2, 1, None, 0, "mlp-worker-0:6666"),
    "jsrun-2-rank1": ("127.0.0.1", 20781, 2, 1, None, 0, "1234567 1"),
    # WORLD_SIZE=16 counts nprocPerNode, which torchrun would start.
    "kubeflow-pytorchjob-worker0": ("mlp-master-0", 8476, 2, 1, None, 0, "mlp-master-0:8476"),
    "kubeflow-trainer-node1": ("mlp-node-0-0.mlp", 8476, 2, 1, None, 0, "mlp-node-0-0.mlp:8476"),
    "leader_worker_set-worker1": (
        "mlp-0.mlp.default",
        8476,
        2,
        1,
        None,
        0,
        "mlp-0.mlp.default:8476",
    ),
    "metaflow-node1": ("10.0.0.4", 8476, 2, 1, None, 0, "10.0.0.4:8476"),
    "sagemaker-algo-1-alone": ("algo-1", 8476, 1, 0, None, 0, "algo-1:8476"),
    "sagemaker-algo-2": ("algo-1", 8476, 2, 1, None, 0, "algo-1:8476"),
    "skypilot-node1": ("10.164.0.4", 24121, 2, 1, None, 0, SKYPILOT_TASK),
    "slurm-pmi2-2n-rank1": ("n1", 20291, 2, 1, None, 0, "3.0"),
    "slurm-torch_names-2n-rank1": ("n1", 20291, 2, 1, None, 0, "3.0"),
    "tf_config-worker0": ("host1", 2222, 3, 1, None, 0, "host1:2222"),
    "torch_env-azureml-2n-rank1": ("10.0.0.4", 27437, 2, 1, None, 0, "10.0.0.4 6105"),
    "torch_env-by_hand-rank1": ("127.0.0.1", 20262, 4, 1, (1,), 0, "127.0.0.1 29500"),
    "torch_env-volcano-worker0": (
        "mlp-master-0.mlp",
        20115,
        2,
        1,
        None,
        0,
        "mlp-master-0.mlp 23456",
    ),
    "torchrun-1-rank0": ("127.0.0.1", 27367, 1, 0, None, 0, f"{TORCH_RUNS[1]} localhost 45021"),
    "torchrun-2-rank0": ("127.0.0.1", 20703, 2, 0, None, 0, f"{TORCH_RUNS[0]} localhost 37639"),
    "torchrun-2-rank1": ("127.0.0.1", 20703, 2, 1, None, 0, f"{TORCH_RUNS[0]} localhost 37639"),
    "torchrun-c10d-2n2t-rank3": ("n1.cluster", 23029, 4, 3, None, 1, "job7 n1.cluster 43425"),
    "torchrun-deepspeed-2n4t-rank3": ("10.0.0.4", 27547, 4, 3, (1,), 0, "10.0.0.4 29500"),
    "torchrun-ray_train-2n2t-rank2": ("10.0.0.4", 26996, 4, 2, None, 0, "10.0.0.4 41231"),
    # One task a node for SLURM, of which torchrun makes two.
    "torchrun-slurm-2n4t-rank2": ("n1", 27116, 4, 2, None, 0, "none n1 29500"),
    "vertex-pool1-worker1": (VERTEX_HOST, 2222, 3, 2, None, 0, f"{VERTEX_HOST}:2222"),
    "volcano-worker1": ("mlp-worker-0.mlp", 8476, 2, 1, None, 0, "mlp-worker-0.mlp:8476"),
}

SRUN = "HINT: srun python -m launcher"
NO_ADDRESS = "no variable says where rank 0 is\n  HINT: set PODLIFT_COORDINATOR_ADDRESS=HOST:PORT"

# file: None for no cluster, or what the error says
OTHERS = {
    "open_mpi-5-two_machines-rank3": "PODLIFT_COORDINATOR_ADDRESS=HOST:PORT",
    "slurm-arbitrary-rank0": "does not say where rank 0 is",
    "slurm-arbitrary-rank1": "does not say where rank 0 is",
    "slurm-batch-1n1t": None,
    "slurm-batch-2n": SRUN,
    "slurm-batch-2n4t": SRUN,
    "slurm-interactive-2n4t": SRUN,
    "slurm-salloc-2n4t": SRUN,
    "slurm-gres-odd-rank1": "HINT: srun --gpus-per-task=N",
    "slurm-gres-shared-rank1": "2 tasks on this node cannot share 1 accelerators",
    "flux-2n4t-without_pmi-rank3": f"FLUX_JOB_SIZE=4, but {NO_ADDRESS}",
    "horovod-2n4t-rank3": f"HOROVOD_SIZE=4, but {NO_ADDRESS}",
    "hydra-mpich-2-without_pmi-rank1": "PMI_SIZE=2, but no variable says which job this is",
    "jsrun-2n4t-rank3": f"JSM_NAMESPACE_SIZE=4, but {NO_ADDRESS}",
    "mvapich-2n4t-rank3": f"MV2_COMM_WORLD_SIZE=4, but {NO_ADDRESS}",
    "pmi-pals-2n4t-rank3": f"PMI_SIZE=4, but {NO_ADDRESS}",
    "tf_config-parameter_server": "TF_CONFIG has tasks of type ps",
    "vertex-pool3-evaluator": "CLUSTER_SPEC has no task workerpool3 0 among those that train",
    "volcano-two_tasks": "Volcano has several tasks (VC_MASTER_HOSTS, VC_WORKER_HOSTS)",
}
# Launchers without a class of their own: None for a job of one process.
UNKNOWN = {
    "other-base_command-node1": "NGC_ARRAY_SIZE=2: podlift does not know how to join",
    "other-condor-node1": "_CONDOR_NPROCS=2: podlift does not know how to join",
    "other-jax-coordinator_only": "JAX_COORDINATOR_ADDRESS=n1:1234 is of a job of several",
    "other-jax-without_rank": "JAX_NUM_PROCESSES=2, but JAX_PROCESS_ID or JAX_PROCESS_INDEX is not",
    "other-left_over": None,
    "other-lsf-1n": None,
    "other-lsf-2n": "LSF has 2 hosts for this job (LSB_MCPU_HOSTS)",
    "other-pbs-1n": None,
    "other-pbs-2n": "PBS has 2 hosts for this job (PBS_NODEFILE)",
    "other-prte-rank1": "PMIX_RANK=1 is of a job of several processes",
    "other-sge-1n": None,
    "other-sge-2n": "Grid Engine has 2 hosts for this job (PE_HOSTFILE)",
    "other-skypilot-torchrun": "torchrun has 1 process (",
    "other-slurm_shell-pmix": None,
    "other-torch-without_address": "WORLD_SIZE=4, but MASTER_ADDR is not set",
    "other-torch-without_rank": "WORLD_SIZE=4, but RANK is not set",
    "other-torque-2n": "PBS has 2 hosts for this job",
}


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_recorded_environment_gives_its_placement(name):
    found = detect(recorded(name))
    cluster = name.partition("-")[0]
    host, port, size, rank, devices, attempt, job = PLACEMENTS[name]
    assert (found.cluster, found.host, found.port) == (cluster, host, port)
    assert (found.num_processes, found.process_id) == (size, rank)
    assert found.local_device_ids == devices
    assert (found.attempt, found.job) == (attempt, f"{cluster} {job}")
    assert set(found.variables) <= set(recorded(name))
    assert found.variables
    assert detect(recorded(name), cluster) == found
    assert detect(recorded(name), "none") is None


@pytest.mark.parametrize("name", OTHERS)
def test_a_recorded_environment_without_a_placement_says_why(name):
    if OTHERS[name] is None:
        assert detect(recorded(name)) is None
        return
    with pytest.raises(UserError) as error:
        detect(recorded(name))
    assert OTHERS[name] in str(error.value)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_podlift_cannot_join_never_trains_alone(name):
    if UNKNOWN[name] is None:
        found = detect(recorded(name))
        assert found is None or found.num_processes == 1
        return
    with pytest.raises(UserError) as error:
        detect(recorded(name))
    assert UNKNOWN[name] in error.value.message
    # What to do: the flags, or an address, or the launcher that has several; and how to mean one.
    for hint in ("--coordinator_address=HOST:PORT --num_processes=N", "--cluster=skypilot"):
        if hint in error.value.hint:
            break
    else:
        raise AssertionError(error.value.hint)
    assert "--cluster=none" in error.value.hint
    assert detect(recorded(name), "none") is None


def test_every_recorded_environment_is_tested():
    names = {path.stem for path in RECORDED.glob("*.env")}
    assert names == {*PLACEMENTS, *OTHERS, *UNKNOWN}
    clusters = {name.partition("-")[0] for name in names}
    assert clusters == {cluster.name for cluster in CLUSTERS} | {"other"}


def test_without_a_scheduler_there_is_no_cluster():
    assert detect({}) is None
    assert detect({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}) is None
    assert detect({"SLURM_CONF": "slurm.conf", "CUDA_VISIBLE_DEVICES": "0"}) is None


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_address_that_a_script_sets_wins(name):
    env = {**recorded(name), "PODLIFT_COORDINATOR_ADDRESS": "[fd00::2]:9001"}
    found = detect(env)
    assert (found.host, found.port) == ("fd00::2", 9001)
    assert "PODLIFT_COORDINATOR_ADDRESS" in found.variables
    found = detect({**env, "PODLIFT_COORDINATOR_ADDRESS": "first"})
    assert (found.host, found.port) == ("first", 8476)


def test_the_address_that_a_script_sets_locates_rank_0_where_nothing_else_does():
    for name in ("slurm-arbitrary-rank1", "open_mpi-5-two_machines-rank3"):
        found = detect(changed(name, PODLIFT_COORDINATOR_ADDRESS="n3:9001"))
        assert (found.host, found.port) == ("n3", 9001)


CONTRADICTIONS = [
    ("slurm-2n4t-rank3", {"SLURM_PROCID": "4"}, "process 4 is not in 0..3"),
    ("slurm-2n4t-rank3", {"SLURM_PROCID": "-1"}, "process -1 is not in 0..3"),
    ("slurm-2n4t-rank3", {"SLURM_STEP_NUM_TASKS": "0"}, "a job of 0 processes"),
    ("slurm-2n4t-rank3", {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is not an integer"),
    ("slurm-2n4t-rank3", {"SLURM_JOB_ID": "1.5"}, "SLURM_JOB_ID='1.5' is not an integer"),
    ("slurm-2n4t-rank3", {"SLURM_RESTART_COUNT": "-1"}, "SLURM_RESTART_COUNT=-1 is less than 0"),
    ("slurm-2n4t-rank3", {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1 is not in 0..0"),
    ("slurm-2n4t-rank3", {"SLURM_STEP_NODELIST": "n[1-"}, "is not a list of hosts"),
    ("slurm-2n4t-rank3", {"SLURM_PROCID": None}, "in a SLURM step, but SLURM_PROCID is not set"),
    (
        "slurm-2n4t-rank3",
        {"SLURM_GTIDS": None, "SLURM_NODEID": "2"},
        "SLURM_NODEID=2 is not in 0..1",
    ),
    (
        "slurm-2n4t-rank3",
        {"PODLIFT_COORDINATOR_ADDRESS": "n1:99999"},
        "PODLIFT_COORDINATOR_ADDRESS=n1:99999: not an address",
    ),
    ("open_mpi-4-rank3", {"OMPI_COMM_WORLD_RANK": "4"}, "process 4 is not in 0..3"),
    ("open_mpi-4-rank3", {"OMPI_COMM_WORLD_LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not in 0..3"),
    ("open_mpi-4-rank3", {"OMPI_COMM_WORLD_LOCAL_SIZE": "0"}, "LOCAL_SIZE=0 is less than 1"),
    (
        "open_mpi-4-rank3",
        {"OMPI_MCA_orte_hnp_uri": None, "PMIX_NAMESPACE": None},
        "neither OMPI_MCA_orte_hnp_uri nor PMIX_NAMESPACE",
    ),
    (
        # mpirun saw only the loopback of its machine, and there are others.
        "open_mpi-4-rank3",
        {"OMPI_COMM_WORLD_SIZE": "5"},
        "on which of several machines rank 0 is",
    ),
    ("open_mpi-4-rank3", {"PODLIFT_NUM_GPUS": "6"}, "4 tasks on this node cannot share 6"),
    ("kubernetes-job-pod1", {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2 is not in 0..1"),
    ("kubernetes-job-pod1", {"PODLIFT_NUM_PROCESSES": None}, "scripts/k8s/render.sh"),
    ("kubernetes-job-pod1", {"PODLIFT_COORDINATOR_ADDRESS": ""}, "scripts/k8s/render.sh"),
    (
        "kubernetes-jobset-gpu-job1-pod0",
        {"PODLIFT_JOB_INDEX": "2"},
        "process 4 is not in 0..3",
    ),
    ("kubernetes-jobset-gpu-job1-pod0", {"JOB_COMPLETION_INDEX": "2"}, "2 pods in a job"),
    # Worker 2 of 2 in slice 0 would be the rank of worker 0 in slice 1.
    ("tpu_gke-multislice-slice1-worker1", {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID=2 is not in 0..1"),
    ("tpu_gke-multislice-slice1-worker1", {"MEGASCALE_SLICE_ID": "2"}, "there are 2 slices"),
    ("tpu_gke-multislice-slice1-worker1", {"MEGASCALE_NUM_SLICES": "0"}, "is less than 1"),
    (
        "tpu_gke-multislice-slice1-worker1",
        {"MEGASCALE_COORDINATOR_ADDRESS": None},
        "MEGASCALE_COORDINATOR_ADDRESS is not set",
    ),
    ("tpu_gke-notebook", {"PODLIFT_NUM_PROCESSES": "4"}, "=4, but tpu_gke has 1"),
    (
        "tpu_gce-v4-32-worker3",
        {"gce/worker-network-endpoints": "a:b"},
        "worker-network-endpoints holds 'a:b'",
    ),
    ("tpu_gce-v4-32-worker3", {"gce/agent-worker-number": "4"}, "there are 4 hosts"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), CONTRADICTIONS)
def test_variables_that_contradict_each_other_are_an_error_of_one_line(name, changes, expected):
    with pytest.raises(UserError) as error:
        detect(changed(name, **changes))
    assert expected in str(error.value)
    assert "\n" not in error.value.message
    assert "\n" not in error.value.hint


@pytest.mark.parametrize(
    ("env", "choice", "expected"),
    [
        ({}, "slrum", "HINT: auto, none, torchrun, horovod, jsrun, open_mpi,"),
        ({}, "by_hand", "there is no such cluster"),
        ({}, "slurm", "SLURM_JOB_ID, SLURM_STEP_ID, SLURM_PROCID, SLURM_STEP_NODELIST or"),
        ({}, "open_mpi", "OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK is not set"),
        ({}, "tpu_gke", "TPU_WORKER_ID, TPU_PROCESS_ADDRESSES or TPU_WORKER_HOSTNAMES"),
        ({}, "tpu_gce", "gce/agent-worker-number, gce/worker-network-endpoints"),
        ({"KUBERNETES_SERVICE_HOST": "1"}, "kubernetes", "but JOB_COMPLETION_INDEX, PODLIFT_NUM"),
        ("slurm-batch-1n1t", "slurm", "but SLURM_STEP_ID is not set"),
        ("slurm-interactive-2n4t", "slurm", SRUN),
    ],
)
def test_a_cluster_asked_for_by_name_must_be_there(env, choice, expected):
    with pytest.raises(UserError) as error:
        detect(recorded(env) if isinstance(env, str) else env, choice)
    assert expected in str(error.value)


def test_inside_another_cluster_the_one_that_started_the_process_counts():
    # mpirun in a SLURM job: the variables of SLURM are those of its daemons, one a node.
    env = recorded("open_mpi-slurm-2n4t-rank3")
    assert (env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]) == ("1", "2")
    assert detect(env, "open_mpi") == detect(env)
    # A pod with TPUs is a pod of an Indexed Job as well.
    with pytest.raises(UserError, match="PODLIFT_NUM_PROCESSES"):
        detect(recorded("tpu_gke-v5e-16-worker2"), "kubernetes")


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys; from launcher.clusters import gce_metadata;"
        "from launcher.clusters.detect import detect;"
        "detect(gce_metadata.read_gce_metadata({}, has_tpu=lambda: False));"
        "heavy = {'jax', 'numpy', 'absl', 'asyncio', 'urllib.request', 'socket', 'subprocess'};"
        "print(*heavy & set(sys.modules))"
    )
    root = ROOT
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == []
