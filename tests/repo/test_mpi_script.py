"""scripts/mpi.sh, with a stand-in for mpirun."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess

import pytest
from conftest import ROOT
from script_runs import HOSTILE, MLP, MPI, SCRIPTS, only, wait_for


def mpi_environ(run_script, **environ):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return as_root | {"PODLIFT_PYTHON": "/my python"} | environ


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 1), (2, 2), (42, 42), (137, 42)])
def test_mpi_on_one_machine(run_script, rank, expected):
    run_script.stand_in("mpirun", f'record "$@"; exit {rank}')
    done = run_script(
        MPI, "-n", 3, "--", MLP, HOSTILE, **mpi_environ(run_script, XLA_FLAGS="--xla_a")
    )
    assert done.returncode == expected, done
    *given, workdir = only(run_script.calls("mpirun"))
    assert given == [
        *["-n", "3", "-x", "XLA_FLAGS", "-x", "PODLIFT_PYTHON"],
        *["/my python", "-m", "launcher", MLP, HOSTILE],
    ]
    assert workdir.startswith("--workdir=runs/mpi-2")  # one for all ranks, named by the time


def test_mpi_keeps_a_given_workdir(run_script):
    run_script.stand_in("mpirun", 'record "$@"')
    run_script(MPI, "-n", 3, MLP, "--workdir=x", **mpi_environ(run_script))
    assert only(run_script.calls("mpirun"))[-2:] == [MLP, "--workdir=x"]


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a:8,b:8", "a"),
        ("a,a", None),
        ("localhost:2", None),
        ("a,HERE", "HERE"),
        ("localhost,b", "HERE"),
    ],
)
@pytest.mark.parametrize("by_file", [False, True])
def test_mpi_names_the_machine_of_rank_0(run_script, tmp_path, hosts, first, by_file):
    """Open MPI puts rank 0 on this machine if the list contains it at any position."""
    here = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    hosts = hosts.replace("HERE", here)
    where = ["-H", hosts]
    if by_file:
        lines = ["# comment", "", *(host.replace(":", " slots=") for host in hosts.split(","))]
        (tmp_path / "hosts").write_text("\n".join(lines))
        where = ["--hostfile", tmp_path / "hosts"]
    run_script.stand_in("mpirun", 'record "$@"; echo "${PODLIFT_COORDINATOR_ADDRESS-none}"')
    done = run_script(MPI, "-n", 2, *where, MLP, **mpi_environ(run_script))
    address = done.stdout.strip()
    if first is None:
        assert address == "none"
        assert "PODLIFT_COORDINATOR_ADDRESS" not in only(run_script.calls("mpirun"))
    else:
        assert re.fullmatch(re.escape(first.replace("HERE", here)) + ":2[0-9]{4}", address)
        assert "PODLIFT_COORDINATOR_ADDRESS" in only(run_script.calls("mpirun"))
    given = run_script(
        MPI, "-n", 2, *where, MLP, **mpi_environ(run_script, PODLIFT_COORDINATOR_ADDRESS="me:1234")
    )
    assert given.stdout.strip() == "me:1234"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_mpi_asks_the_ranks_to_save(run_script, tmp_path, number):
    run_script.stand_in(
        "mpirun",
        f"trap 'record USR1; sleep 1; exit 42' USR1; trap 'record TERM; exit 1' TERM INT\n"
        f"touch {tmp_path}/started; while true; do sleep 0.1; done",
    )
    with start_mpi(run_script) as script:
        wait_for((tmp_path / "started").exists)
        # A terminal sends Ctrl-C to the whole process group of the script.
        os.killpg(script.pid, number)
        assert script.wait(20) == 42
    assert run_script.calls("mpirun") == [["USR1"]]


def test_mpi_does_not_wait_after_a_second_interrupt(run_script, tmp_path):
    run_script.stand_in(
        "mpirun",
        f"trap 'record USR1' USR1; trap 'record TERM; exit 1' TERM\n"
        f"touch {tmp_path}/started; while true; do sleep 0.1; done",
    )
    with start_mpi(run_script) as script:
        wait_for((tmp_path / "started").exists)
        os.killpg(script.pid, signal.SIGINT)
        wait_for(lambda: run_script.calls("mpirun") == [["USR1"]])
        os.killpg(script.pid, signal.SIGINT)
        assert script.wait(20) == 130
    assert run_script.calls("mpirun") == [["USR1"], ["TERM"]]


def start_mpi(run_script):
    return subprocess.Popen(
        ["bash", str(SCRIPTS / MPI), "-n", "2", MLP],
        env=run_script.environ | mpi_environ(run_script),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_mpi_runs_as_root_only_if_the_user_allows_it(run_script):
    run_script.stand_in("mpirun", 'record "$@"')
    done = run_script(MPI, "-n", 2, MLP, PODLIFT_PYTHON="python")
    assert done.returncode == 2
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in done.stderr
    assert run_script.calls("mpirun") == []


def test_mpi_dry_run(run_script):
    done = run_script(MPI, "-n", 2, "--dry-run", "-H", "a,b", MLP, PODLIFT_PYTHON="/my python")
    address, *words = shlex.split(done.stdout)
    assert re.fullmatch("PODLIFT_COORDINATOR_ADDRESS=a:2[0-9]{4}", address)
    assert words[:5] == ["mpirun", "-n", "2", "-H", "a,b"]
    assert words[-4:] == ["/my python", "-m", "launcher", MLP]
