"""Where a process stands is read from the variables that its scheduler sets."""

from __future__ import annotations

import http.server
import os
import shutil
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, skip_here

from launcher.clusters.detect import CLUSTERS, by_hand, detect
from launcher.clusters.gce_metadata import fetch_attribute, has_tpu, read_gce_metadata
from launcher.clusters.hostlist import expand, expand_counts
from launcher.clusters.open_mpi import hnp_hosts
from launcher.clusters.read import device_share, parse_address, visible_devices
from trainer.errors import UserError

RECORDED = ROOT / "tests/recorded"
MEGASCALE_HOST = "multislice-job-slice-0-0.multislice-job"


def recorded(name):
    """The variables of a recorded file."""
    lines = (RECORDED / f"{name}.env").read_text().splitlines()
    assert lines[0].startswith("# source: ")
    pairs = (line.split("=", 1) for line in lines[1:])
    return {name: value.replace("\\n", "\n") for name, value in pairs}


def changed(name, **changes):
    """Recorded variables with some changed, or left out where the change is None."""
    env = {**recorded(name), **changes}
    return {name: value for name, value in env.items() if value is not None}


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
}

SRUN = "HINT: srun python -m launcher"
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
def test_a_recorded_environment_that_is_no_placement_says_why(name):
    if OTHERS[name] is None:
        assert detect(recorded(name)) is None
        return
    with pytest.raises(UserError) as error:
        detect(recorded(name))
    assert OTHERS[name] in str(error.value)


def test_every_recorded_environment_is_expected_to_be_something():
    names = {path.stem for cluster in CLUSTERS for path in RECORDED.glob(f"{cluster.name}-*.env")}
    assert names == {*PLACEMENTS, *OTHERS}


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


def test_the_address_that_a_script_sets_helps_where_nothing_says_where_rank_0_is():
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
    # WorkerSpec 2 of 2 in slice 0 would be the rank of worker 0 in slice 1.
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
        ({}, "slrum", "HINT: auto, none, open_mpi, slurm, tpu_gke, tpu_gce, kubernetes"),
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


def test_one_cluster_inside_another_is_taken_for_what_started_the_process():
    # mpirun in a SLURM job: the variables of SLURM are those of its daemons, one a node.
    env = recorded("open_mpi-slurm-2n4t-rank3")
    assert (env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]) == ("1", "2")
    assert detect(env, "open_mpi") == detect(env)
    # A pod with TPUs is a pod of an Indexed Job as well.
    with pytest.raises(UserError, match="PODLIFT_NUM_PROCESSES"):
        detect(recorded("tpu_gke-v5e-16-worker2"), "kubernetes")


def test_ports_differ_between_jobs_and_steps_and_agree_between_ranks():
    def port(**changes):
        return detect(changed("slurm-2n4t-rank3", **changes)).port

    jobs = {
        port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))
        for job in (7, 8, 104, 9999, 10006)
        for step in (0, 1, 2)
    }
    assert len(jobs) == 15
    assert all(20000 <= number < 30000 for number in jobs)
    assert port() == port(SLURM_PROCID="0", SLURM_NODEID="0", SLURM_LOCALID="0")


def test_slurm_counts_the_tasks_of_a_node_without_their_ids():
    env = changed("slurm-gres-2n-rank3", SLURM_GTIDS=None)
    assert detect(env).local_device_ids == (2, 3)
    assert detect({**env, "SLURM_STEP_TASKS_PER_NODE": "4,1", "SLURM_LOCALID": "0"}) == detect(
        changed("slurm-gres-2n-rank3", SLURM_GTIDS="3", SLURM_LOCALID="0")
    )


def test_slurm_options_that_bind_are_checked_against_the_numbers():
    # Two tasks that see all four GPUs share them, whatever was asked for.
    env = changed("slurm-gres-2n-rank3", SLURM_GPUS_PER_TASK="2")
    assert detect(env).local_device_ids == (2, 3)
    # Two GPUs of four for each of two tasks: bound only if something says so.
    env = changed("slurm-gres-2n-rank3", CUDA_VISIBLE_DEVICES="0,1")
    assert detect(env).local_device_ids == (1,)
    assert detect({**env, "SLURM_TRES_PER_TASK": "cpu=2"}).local_device_ids == (1,)
    assert detect({**env, "SLURM_TRES_PER_TASK": "cpu=2,gres/gpu=2"}).local_device_ids is None


@pytest.mark.parametrize(
    ("visible", "on_node", "tasks", "local_rank", "bound", "expected"),
    [
        (4, 4, 1, 0, False, None),
        (8, 8, 4, 3, False, (6, 7)),
        (4, 4, 4, 0, False, (0,)),
        (4, None, 4, 1, False, (1,)),
        (None, None, 4, 1, False, None),
        (0, 4, 4, 1, False, None),
        (1, 4, 4, 3, False, None),  # CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
        (1, None, 4, 3, False, None),
        (2, 4, 2, 1, True, None),
        (2, 4, 2, 1, False, (1,)),
        (4, 4, 2, 1, True, (2, 3)),
        (2, 4, 4, 1, False, UserError),  # pairs of tasks near the same two devices
        (1, 1, 2, 1, False, UserError),
        (3, 3, 2, 0, False, UserError),
    ],
)
def test_devices_are_shared_only_by_tasks_that_see_the_same_ones(
    visible, on_node, tasks, local_rank, bound, expected
):
    arguments = (visible, on_node, tasks, local_rank, bound, "hint")
    if expected is UserError:
        with pytest.raises(UserError, match="cannot share"):
            device_share(*arguments)
    else:
        assert device_share(*arguments) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,GPU-46309653"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0,1"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "0,1"}, 2),
    ],
)
def test_visible_devices_are_counted(env, expected):
    assert visible_devices(env) == expected


def test_open_mpi_ranks_share_what_the_launcher_has_counted():
    assert detect(changed("open_mpi-2-rank1", PODLIFT_NUM_GPUS="8")).local_device_ids == (
        4,
        5,
        6,
        7,
    )
    one = {"PODLIFT_NUM_GPUS": "8", "CUDA_VISIBLE_DEVICES": "1"}
    assert detect(changed("open_mpi-2-rank1", **one)).local_device_ids is None


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", ["10.96.0.1", "10.148.0.1"]),
        ("1.0;tcp6://[fe80::b9b:0:1,2620:10d::2]:43370", ["fe80::b9b:0:1", "2620:10d::2"]),
        ("1.0;tcp://10.0.0.2:39111;tcp6://[fd00::2]:55217", ["10.0.0.2", "fd00::2"]),
        ("1.0;tcp://172.20.0.8:33559;tcp://172.40.0.8:33559", ["172.20.0.8", "172.40.0.8"]),
        ("", []),
        ("nonsense", []),
    ],
)
def test_the_addresses_of_mpirun_are_read(uri, expected):
    assert hnp_hosts(uri) == expected


def test_open_mpi_on_several_machines_meets_where_others_can_reach_mpirun():
    uri = "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911"
    env = changed("open_mpi-4-rank3", OMPI_COMM_WORLD_SIZE="8", OMPI_MCA_orte_hnp_uri=uri)
    assert detect(env).host == "10.148.0.1"
    assert detect({**env, "SLURM_JOB_NODELIST": "n[2-5]"}).host == "n2"


def test_tpu_variables_win_over_the_metadata_and_over_each_other():
    env = recorded("tpu_gce-multislice-slice1-worker0")
    assert detect({**env, "MEGASCALE_SLICE_ID": "0"}).process_id == 0
    assert detect({**env, "MEGASCALE_SLICE_ID": ""}).process_id == 2
    env = changed("tpu_gke-v5e-16-worker2", TPU_PROCESS_ADDRESSES="a:8471,b:8471,c:8471")
    assert (detect(env).host, detect(env).num_processes) == ("a", 3)


def test_the_port_is_not_one_of_libtpu():
    addresses = "localhost:8476,localhost:8477"
    env = changed("tpu_gke-v5e-16-worker2", TPU_PROCESS_ADDRESSES=addresses, TPU_WORKER_ID="1")
    assert detect(env).port == 8478


def test_a_placement_by_hand():
    found = by_hand(" [fd00::1]:8476 ", 4, 3, {"PODLIFT_RESTART_ATTEMPT": "2"})
    assert (found.cluster, found.host, found.port) == ("by hand", "fd00::1", 8476)
    assert (found.num_processes, found.process_id, found.attempt) == (4, 3, 2)
    assert found.job == "by hand [fd00::1]:8476"
    assert (found.local_device_ids, found.variables) == (None, ())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, 2, 0), "--coordinator_address is missing"),
        (("a:1", None, None), "--num_processes and --process_id are missing"),
        (
            ("a", 2, 0),
            "--coordinator_address=a: not an address\n  HINT: --coordinator_address=HOST",
        ),
        (("a:0", 2, 0), "not an address"),
        (("fd00::1:8476", 2, 0), "HOST:PORT, or [IPV6]:PORT"),
        (("a:1", 2, 2), "process 2 is not in 0..1"),
        (("a:1", 2, -1), "process -1 is not in 0..1"),
        (("a:1", 0, 0), "a job of 0 processes"),
    ],
)
def test_a_placement_by_hand_is_checked(arguments, expected):
    with pytest.raises(UserError) as error:
        by_hand(*arguments, env={})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    "text", ["", ":1", "a b:1", "a:b", "a:70000", "[a", "[fd00::1]x:1", "a:1:2"]
)
def test_a_malformed_address_is_refused(text):
    with pytest.raises(UserError, match="not an address"):
        parse_address(text, "--flag", 1)


HOSTLISTS = {
    "login": ["login"],
    "n5,n1,n5": ["n5", "n1", "n5"],
    "n[1-3]": ["n1", "n2", "n3"],
    "n[1-3,07,9-11]": ["n1", "n2", "n3", "n07", "n9", "n10", "n11"],
    "n[1-3,07,9-11],login": ["n1", "n2", "n3", "n07", "n9", "n10", "n11", "login"],
    "a,b[2,1],c": ["a", "b2", "b1", "c"],
    "n[09-11]": ["n09", "n10", "n11"],
    "n[001-3]": ["n001", "n002", "n003"],
    "n[1-1]": ["n1"],
    "r[1-2]n[01-02]": ["r1n01", "r1n02", "r2n01", "r2n02"],
    "r[1-2][5-6]": ["r15", "r16", "r25", "r26"],
    "gpu-a[01-02],x.example.org": ["gpu-a01", "gpu-a02", "x.example.org"],
}
# SLURM 22.05 refuses what follows a bracket; newer versions print it.
SUFFIXED = {"gpu-a[01-02]-b,login": ["gpu-a01-b", "gpu-a02-b", "login"]}


@pytest.mark.parametrize(("hostlist", "expected"), [*HOSTLISTS.items(), *SUFFIXED.items()])
def test_a_list_of_hosts_is_expanded(hostlist, expected):
    assert expand(hostlist) == expected


@pytest.mark.parametrize(
    "hostlist", ["", "n[3-1]", "n[]", "n[1,]", "n[a-b]", "n[1-", "n1,,n2", "n1]"]
)
def test_a_malformed_list_of_hosts_is_refused(hostlist):
    with pytest.raises(UserError):
        expand(hostlist)


@skip_here("" if shutil.which("scontrol") else "SLURM's scontrol is not installed")
def test_scontrol_expands_the_same(tmp_path):
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    env = {**os.environ, "SLURM_CONF": str(config)}
    for hostlist, expected in HOSTLISTS.items():
        command = ["scontrol", "show", "hostnames", hostlist]
        shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert shown.stdout.split() == expected, hostlist


def test_counts_a_node_are_expanded():
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]
    with pytest.raises(UserError):
        expand_counts("4x2")


class Metadata(http.server.BaseHTTPRequestHandler):
    """A metadata server that lacks one attribute, fails once at another, and always at a third."""

    failures = 0

    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        type(self).failures += key == "flaky"
        if self.headers["Metadata-Flavor"] != "Google":
            self.answer(403, "")
        elif key == "broken" or (key == "flaky" and self.failures == 1):
            self.answer(503, "")
        elif key == "tpu-env":
            self.answer(404, "")
        else:
            self.answer(200, {"agent-worker-number": "1"}.get(key, "t1v-n-0-w-0,t1v-n-0-w-1"))

    def answer(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def metadata_server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):  # which nothing listens to
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    Metadata.failures = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_metadata_server_places_a_tpu_vm(metadata_server):
    found = read_gce_metadata({}, lambda key: fetch_attribute(key, metadata_server), lambda: True)
    assert found == {
        "gce/agent-worker-number": "1",
        "gce/worker-network-endpoints": "t1v-n-0-w-0,t1v-n-0-w-1",
    }
    placement = detect(found)
    assert (placement.cluster, placement.host) == ("tpu_gce", "t1v-n-0-w-0")
    assert (placement.num_processes, placement.process_id) == (2, 1)


def test_a_metadata_server_that_fails_is_asked_again_and_then_reported(metadata_server):
    assert fetch_attribute("flaky", metadata_server, pause=0).startswith("t1v")
    with pytest.raises(UserError, match="does not tell broken: status 503"):
        fetch_attribute("broken", metadata_server, pause=0)


def test_a_metadata_server_that_is_silent_is_reported_and_one_that_is_not_there_is_not():
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:  # accepts, never answers
        silent = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match="TPU_SKIP_MDS_QUERY=1"):
            fetch_attribute("tpu-env", silent, timeout=0.05, pause=0)
    assert fetch_attribute("tpu-env", silent) is None


def test_nothing_is_asked_without_a_tpu_or_where_the_variables_say_enough():
    def fetch(key):
        raise AssertionError(key)

    assert read_gce_metadata({}, fetch, lambda: False) == {}
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        assert read_gce_metadata({name: "1"}, fetch, lambda: True) == {}
    asked = []
    assert read_gce_metadata({}, asked.append, lambda: True) == {}
    assert asked == ["agent-worker-number"]


def test_a_tpu_is_known_by_its_vendor(tmp_path):
    for device, vendor in (("0000:00:04.0", "0x1af4"), ("0000:00:05.0", "0x1ae0")):
        assert not has_tpu(tmp_path)
        (tmp_path / device).mkdir()
        (tmp_path / device / "vendor").write_text(f"{vendor}\n")
    assert has_tpu(tmp_path)


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
