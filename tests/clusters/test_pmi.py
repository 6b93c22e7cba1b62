"""PMI: ranks of MPICH, Intel MPI and Flux ask their process manager where rank 0 is."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, skip_here

from launcher.clusters import pmi
from trainer.errors import UserError


class ProcessManager:
    """The other end of PMI_FD for all ranks of a job, in the words of MPICH 5.0.2."""

    def __init__(self, size, faults=None):
        pairs = [socket.socketpair() for _ in range(size)]
        self.mine = [pair[0] for pair in pairs]
        self.theirs = [pair[1] for pair in pairs]
        self.asked, self.stored, self.faults = [], {}, faults or {}
        self.all_here = threading.Barrier(size, timeout=60)
        for end in self.mine:
            threading.Thread(target=self.serve, args=(end,), daemon=True).start()

    def serve(self, end):
        with end.makefile("rwb") as lines:
            for line in lines:
                words = dict(word.split("=", 1) for word in line.decode().split())
                self.asked.append(words["cmd"])
                answer = self.faults.get(words["cmd"]) or self.answer(words)
                lines.write(answer.encode() + b"\n")
                lines.flush()

    def answer(self, words):
        if words["cmd"] == "init":
            return "cmd=response_to_init rc=0 pmi_version=1 pmi_subversion=2"
        if words["cmd"] == "get_my_kvsname":
            return "cmd=my_kvsname kvsname=kvs_1"
        if words["cmd"] == "put":
            self.stored[words["key"]] = words["value"]
            return "cmd=put_result rc=0"
        if words["cmd"] == "barrier_in":
            self.all_here.wait()
            return "cmd=barrier_out tag=0"
        if words["cmd"] == "get":
            return f"cmd=get_result rc=0 value={self.stored[words['key']]}"
        return "cmd=finalize_ack rc=0"

    def environ(self, rank):
        """What Hydra sets for a rank on this machine."""
        size = len(self.theirs)
        return {
            "PMI_FD": str(self.theirs[rank].fileno()),
            "PMI_RANK": str(rank),
            "PMI_SIZE": str(size),
            "MPI_LOCALRANKID": str(rank),
            "MPI_LOCALNRANKS": str(size),
        }


@pytest.fixture(autouse=True)
def no_answers_of_another_test():
    pmi._exchange.cache_clear()


def test_both_launchers_of_a_job_find_rank_0(tmp_path):
    manager = ProcessManager(2)
    command = [sys.executable, "-m", "launcher", f"--config={ROOT}/configs/mlp.py", "--dry_run"]
    ranks = [
        subprocess.Popen(
            [*command, f"--workdir={tmp_path}/run"],
            env={**os.environ, "PYTHONPATH": str(ROOT), **manager.environ(rank)},
            pass_fds=[manager.theirs[rank].fileno()],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    out = [process.communicate(timeout=120)[0] for process in ranks]
    rows = [next(line for line in text.splitlines() if "cluster" in line) for text in out]
    assert "hydra: process 0 of 2, rank 0 at 127.0.0.1:2" in rows[0]
    assert rows[1] == rows[0].replace("process 0", "process 1")


def test_ranks_on_other_machines_get_the_host_of_rank_0():
    manager = ProcessManager(2)
    first = {**manager.environ(0), "PMI_HOSTNAME": "n1"}
    answers = {}
    with_first = threading.Thread(target=lambda: answers.update(pmi.read_pmi(first)))
    with_first.start()
    assert pmi.read_pmi(manager.environ(1)) == {"pmi/host": "n1", "pmi/kvsname": "kvs_1"}
    with_first.join()
    assert answers["pmi/host"] == "n1"
    # A sweep detects anew for each of its runs, and the manager takes no second hello.
    assert pmi.read_pmi(manager.environ(1))["pmi/host"] == "n1"
    assert manager.asked.count("init") == 2


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("init", "cmd=response_to_init rc=-1"),
        ("get_my_kvsname", "what"),
        ("get", "cmd=get_result rc=-1 msg=key_not_found"),
    ],
)
def test_a_process_manager_that_fails_is_reported(command, answer):
    manager = ProcessManager(1, {command: answer})
    with pytest.raises(UserError, match="does not say where rank 0 is") as error:
        pmi.read_pmi({**manager.environ(0), "PMI_SIZE": "2"})
    assert "--num_processes=N" in error.value.hint


def test_nothing_is_asked_of_what_is_not_a_process_manager(tmp_path):
    manager = ProcessManager(1)
    assert pmi.read_pmi(manager.environ(0)) == {}  # one rank
    with open(tmp_path / "file", "w") as file:
        for fd in ("", "x", "987", str(file.fileno())):
            assert pmi.read_pmi({"PMI_FD": fd, "PMI_RANK": "1", "PMI_SIZE": "2"}) == {}
    assert manager.asked == []
    assert (tmp_path / "file").read_text() == ""


@skip_here("" if shutil.which("mpiexec.hydra") else "mpiexec.hydra not installed (Debian: mpich)")
def test_a_real_hydra():
    code = "import os; from launcher.clusters.pmi import read_pmi; print(read_pmi(os.environ))"
    shown = subprocess.run(
        ["mpiexec.hydra", "-n", "2", sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    first, second = re.findall(r"{.*?}", shown.stdout)  # two processes write the lines
    assert first == second
    assert "pmi/host" in first
