"""Launchers of rank, size and address: shares of GPUs, addresses, and jobs within jobs."""

from __future__ import annotations

import os

import pytest
from recorded_environ import changed, recorded

from launcher.clusters.allocation import read_node_file
from launcher.clusters.detect import detect
from launcher.clusters.host_lists import read_resource_config
from launcher.clusters.ranks import Ranks
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("torchrun-2-rank1", {"PODLIFT_NUM_GPUS": "8"}, (4, 5, 6, 7)),
        ("torchrun-2-rank1", {"PODLIFT_NUM_GPUS": "8", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ("torchrun-c10d-2n2t-rank3", {"PODLIFT_NUM_GPUS": "2"}, (1,)),
        ("hydra-mpich-2-rank1", {"PODLIFT_NUM_GPUS": "4"}, (2, 3)),
        ("flux-2n4t-rank3", {"PODLIFT_NUM_GPUS": "4"}, (2, 3)),
        # 3 tasks on 2 nodes, of which this one may have 2.
        ("flux-2n4t-rank3", {"FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "2"}, None),
        # The launcher gives a local rank alone: one device each, as with torch.
        ("torch_env-azureml-2n-rank1", {"PODLIFT_NUM_GPUS": "8"}, None),
        (
            "torch_env-azureml-2n-rank1",
            {"AZUREML_NODE_COUNT": None, "LOCAL_RANK": "3", "PODLIFT_NUM_GPUS": "8"},
            (3,),
        ),
        ("skypilot-node1", {"PODLIFT_NUM_GPUS": "8"}, None),
    ],
)
def test_processes_of_a_machine_share_its_gpus(name, changes, expected):
    assert detect(changed(name, **changes)).local_device_ids == expected


def test_a_share_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="2 tasks on this node cannot share 3 accelerators"):
        detect(changed("torchrun-2-rank1", PODLIFT_NUM_GPUS="3"))
    with pytest.raises(UserError, match=r"LOCAL_RANK=2 is not in 0\.\.1"):
        detect(changed("torchrun-2-rank1", LOCAL_RANK="2"))


@pytest.mark.parametrize(
    ("address", "expected"),
    [("fd00::2", "fd00::2"), ("[fd00::2]", "fd00::2"), ("10.0.0.9", "10.0.0.9"), (" n7 ", "n7")],
)
def test_an_address_without_a_port_is_read(address, expected):
    found = detect(changed("torchrun-c10d-2n2t-rank3", MASTER_ADDR=address))
    assert found.host == expected
    assert 20000 <= found.port < 30000


def test_the_port_is_not_that_of_torch():
    # The store of torchrun may listen at MASTER_PORT, and the derived port may be the same.
    env = recorded("torchrun-2-rank0")
    assert detect(env).port != int(env["MASTER_PORT"])
    port = Ranks._derived_port("job", 0)
    assert Ranks._derived_port("job", port) == port + 1


def test_an_id_may_have_any_bytes():
    for job in ("\u01923E", os.fsdecode("\u01923E".encode("latin-1", "replace") + b"\xff")):
        assert detect(changed("flux-2n4t-rank3", FLUX_JOB_ID=job)).job == f"flux {job}"


@pytest.mark.parametrize(
    "name", ["horovod-2n4t-rank3", "jsrun-2n4t-rank3", "mvapich-2n4t-rank3", "pmi-pals-2n4t-rank3"]
)
def test_an_address_is_all_that_some_launchers_lack(name):
    found = detect(changed(name, PODLIFT_COORDINATOR_ADDRESS="n1:9001"))
    assert (found.host, found.port, found.num_processes, found.process_id) == ("n1", 9001, 4, 3)


def test_the_main_node_of_aws_batch_has_a_name():
    with pytest.raises(UserError, match="on the main node HOSTNAME is not set"):
        detect(changed("aws_batch-main-node1", HOSTNAME=None))


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("tf_config-worker0", {"TF_CONFIG": "{"}, "TF_CONFIG is not the JSON of a cluster"),
        ("tf_config-worker0", {"TF_CONFIG": '{"cluster": [1]}'}, "is not the JSON of a cluster"),
        ("sagemaker-algo-2", {"SM_CURRENT_HOST": "algo-3"}, "not a list that has SM_CURRENT_HOST"),
        ("sagemaker-algo-2", {"SM_HOSTS": "7"}, "not a list that has SM_CURRENT_HOST"),
        ("volcano-worker1", {"VC_TASK_INDEX": "2"}, "there are 2 hosts in VC_WORKER_HOSTS"),
        ("kubeflow-trainer-node1", {"PET_NNODES": "1:4"}, "PET_NNODES='1:4' is not an integer"),
        ("jax-trainer-node1", {"JAX_PROCESS_ID": "2"}, "process 2 is not in 0..1"),
        ("jax_job-worker1", {"PROCESS_ID": None}, "NUM_PROCESSES=2, but PROCESS_ID is not set"),
        ("torchrun-2-rank1", {"RANK": None}, "WORLD_SIZE=2, but RANK is not set"),
    ],
)
def test_nonsense_is_refused(name, changes, text):
    with pytest.raises(UserError) as error:
        detect(changed(name, **changes))
    assert text in str(error.value)


def test_one_process_inside_a_job_of_several_is_refused():
    # Two tasks of SLURM, each with a torchrun that knows nothing of the other.
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with pytest.raises(UserError, match=r"torchrun has 1 process .*, but slurm has 2") as error:
        detect(changed("torchrun-slurm-2n4t-rank2", **alone))
    assert error.value.hint.startswith("--cluster=slurm, or --cluster=none")
    # But mpirun -n 1 in a SLURM job of two nodes: SLURM counts the daemons of mpirun.
    ranks = {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}
    local = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert detect(changed("open_mpi-slurm-2n4t-rank3", **ranks, **local)).num_processes == 1


def test_the_hosts_of_sagemaker_may_be_in_a_file(tmp_path):
    job, file = {"TRAINING_JOB_NAME": "mlp"}, tmp_path / "resourceconfig.json"
    assert read_resource_config(job, file) == {}
    file.write_text('{"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}')
    found = detect(job | read_resource_config(job, file))
    assert (found.host, found.num_processes, found.process_id) == ("algo-1", 2, 1)
    assert read_resource_config({}, file) == {}
    file.write_text("[]")
    with pytest.raises(UserError, match="does not say which hosts there are"):
        read_resource_config(job, file)


def test_a_manifest_for_podlift_wins_over_what_an_image_sets():
    left_over = {"WORLD_SIZE": "1", "RANK": "0", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    found = detect(changed("kubernetes-job-pod1", **left_over))
    assert (found.cluster, found.num_processes) == ("kubernetes", 2)


def test_the_hosts_of_pbs_are_in_a_file(tmp_path):
    hosts = tmp_path / "nodes"
    hosts.write_text("n1\nn1\nn2\n")
    found = read_node_file({"PBS_NODEFILE": str(hosts)})
    with pytest.raises(UserError, match="PBS has 2 hosts"):
        detect({"PBS_JOBID": "1", **found})
    assert detect({"PBS_JOBID": "1", **found}, this_machine=True) is None
    assert read_node_file({}) == read_node_file({"PBS_NODEFILE": f"{tmp_path}/none"}) == {}
