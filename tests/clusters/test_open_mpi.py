"""Open MPI: shares of GPUs, and the address of rank 0."""

from __future__ import annotations

import pytest
from recorded_environ import changed

from launcher.clusters.detect import detect
from launcher.clusters.open_mpi import hnp_hosts


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


def test_open_mpi_on_several_machines_takes_the_address_at_which_others_reach_mpirun():
    uri = "1531576320.0;tcp://127.0.0.1,10.148.0.1:34911"
    env = changed("open_mpi-4-rank3", OMPI_COMM_WORLD_SIZE="8", OMPI_MCA_orte_hnp_uri=uri)
    assert detect(env).host == "10.148.0.1"
    assert detect({**env, "SLURM_JOB_NODELIST": "n[2-5]"}).host == "n2"
