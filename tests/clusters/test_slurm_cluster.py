"""SLURM: ports, shares of GPUs, and its way to write host names and counts."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from conftest import skip_here
from recorded_environ import changed

from launcher.clusters.detect import detect
from launcher.clusters.hostlist import expand, expand_counts
from trainer.errors import UserError


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


def test_counts_of_tasks_are_expanded():
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]
    with pytest.raises(UserError):
        expand_counts("4x2")
