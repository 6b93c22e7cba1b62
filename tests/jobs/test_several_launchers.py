"""One launcher a rank, as on a cluster: a rendezvous before jax starts, and a common end."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest
from job_helpers import AT_ONCE, CONFIG, ENVIRON, ends, log_of, processes_of, wait_for_line
from slurm_environ import SLURM


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def begin(start, port, tmp_path):
    """Starts the launcher of one rank by hand."""

    def begin_rank(rank, *arguments, size=2, workdir=tmp_path / "run", host="127.0.0.1"):
        return start(
            CONFIG,
            f"--workdir={workdir}",
            "--fake_devices=2",
            "--config.global_batch_size=96",  # divides by the devices of two and of three
            f"--coordinator_address={host}:{port}",
            f"--num_processes={size}",
            f"--process_id={rank}",
            *arguments,
            environ=ENVIRON,
        )

    return begin_rank


def wait_until_it_listens(port, seconds=60):
    """Waits until a launcher listens on 127.0.0.1."""
    deadline = time.monotonic() + seconds
    while not is_listening(port):
        assert time.monotonic() < deadline, f"nothing listens on port {port}"
        time.sleep(0.02)


def is_listening(port):
    with open("/proc/net/tcp") as table:
        listening = [line.split()[1] for line in table if line.split()[3] == "0A"]
    return f"0100007F:{port:04X}" in listening


SLOW = ["--config.num_steps=2000", "--config.data.delay=0.02"]


def test_two_launchers_train_one_model(begin, tmp_path, monkeypatch):
    """Also where the environment names a proxy, here one that does not answer."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for code, out, err in ends(begin(1), begin(0)):
        assert code == 0, out + err
        assert err == ""
    assert log_of(tmp_path / "run", 1).exists()


def test_all_launchers_report_the_same_root_cause(begin, tmp_path):
    first, second = ends(begin(0, "--config.data.kind=raise"), begin(1, "--config.data.kind=raise"))
    for code, _, err in (first, second):
        assert code == 1
        assert "error: ValueError on rank 1: a fault of the user's code" in err
    assert [err.count("Traceback") for _, _, err in (first, second)] == [1, 0]
    assert json.loads((tmp_path / "run/failure.json").read_text())["rank"] == 1


@pytest.mark.parametrize(
    ("number", "rank", "lost"),
    [(signal.SIGKILL, 1, "lost rank 1 on"), (signal.SIGKILL, 0, "lost rank 0 at")],
)
def test_a_lost_launcher_ends_the_job_in_a_second(begin, tmp_path, number, rank, lost):
    launchers = [begin(0, *SLOW), begin(1, *SLOW)]
    wait_for_line(log_of(tmp_path / "run", 0), "step 10/")
    launchers[rank].send_signal(number)
    killed = time.monotonic()
    ((code, _, err),) = ends(launchers[1 - rank])
    assert time.monotonic() - killed < AT_ONCE
    assert code == 42, err
    assert lost in err
    ends(launchers[rank])
    time.sleep(0.2)
    assert processes_of(tmp_path / "run") == []


@pytest.mark.slow
def test_a_silent_launcher_is_given_up(begin, tmp_path):
    quick = ["--heartbeat_timeout_secs=3"]
    launchers = [begin(0, *SLOW, *quick), begin(1, *SLOW, *quick)]
    wait_for_line(log_of(tmp_path / "run", 0), "step 10/")
    launchers[1].send_signal(signal.SIGSTOP)
    ((code, _, err),) = ends(launchers[0], timeout=20)
    assert code == 42
    assert "lost rank 1 on" in err
    assert "no heartbeat" in err
    launchers[1].send_signal(signal.SIGCONT)
    ((code, _, err),) = ends(launchers[1], timeout=20)
    assert code == 42
    assert "the launcher of rank 1" in err, "not the others, which did not stop"
    assert "s, and the others have given it up" in err


@pytest.mark.slow
def test_the_rank_that_holds_up_the_others_is_named_across_launchers(begin):
    """Also right after an evaluation (of step 14), which may take long; a batch may not."""
    stall = ["--config.data.kind=stall", "--config.data.at_step=15", "--hang_timeout_secs=3"]
    for code, _, err in ends(begin(0, *stall), begin(1, *stall)):
        assert code == 42
        assert "error: rank 1 has made no progress" in err


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_with_one_root_cause(begin, tmp_path):
    launchers = [begin(0, *SLOW), begin(1, *SLOW)]
    wait_for_line(log_of(tmp_path / "run", 0), "step 10/")
    launchers[1].send_signal(signal.SIGINT)
    time.sleep(0.1)
    launchers[1].send_signal(signal.SIGINT)
    first, second = ends(*launchers)
    assert (first[0], second[0]) == (42, 130)
    assert "to the launcher of rank 1" in first[2] or "launcher of rank 1" in first[2]
    assert "SIGKILL" not in first[2]


def test_all_report_that_rank_0_was_stopped_before_all_had_joined(begin):
    launchers = [begin(0, size=3), begin(1, size=3)]
    time.sleep(1.5)
    launchers[0].terminate()
    for code, _, err in ends(*launchers, timeout=20):
        assert code == 42
        assert "before all ranks had joined" in err


def test_a_request_to_one_launcher_stops_all(begin, tmp_path):
    launchers = [begin(0, *SLOW), begin(1, *SLOW)]
    wait_for_line(log_of(tmp_path / "run", 0), "step 10/")
    launchers[1].send_signal(signal.SIGTERM)
    first, second = ends(*launchers)
    assert (first[0], second[0]) == (42, 42), first + second
    assert "SIGTERM to the launcher of rank 1" in first[1]
    assert "asked to stop: saved at step" in first[2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_rank_is_named(begin, rank):
    ((code, out, err),) = ends(begin(rank, "--rendezvous_timeout_secs=1.5", size=3))
    assert code == 42, out + err
    expected = "ranks 1, 2 of 3 did not join within" if rank == 0 else "rank 0 has not answered at"
    assert f"error: {expected}" in err
    assert "HINT" in err


def test_asked_to_stop_while_waiting_for_the_others(begin, port):
    launcher = begin(0)
    wait_until_it_listens(port)
    launcher.send_signal(signal.SIGTERM)
    ((code, _, err),) = ends(launcher, timeout=10)
    assert code == 42
    assert "before all ranks had joined" in err


CONTRADICTIONS = [
    ((0, [], {"size": 2}), (1, [], {"size": 3}), "expects 3 processes"),
    ((0, [], {"size": 3}), (0, [], {"size": 3}), "for the rendezvous of the ranks, is taken"),
    ((0, [], {}), (1, ["--config.seed=1"], {}), "has config.seed 1, rank 0 on"),
]


@pytest.mark.parametrize(("one", "other", "text"), CONTRADICTIONS)
def test_contradictions_are_named_and_not_run(begin, port, tmp_path, one, other, text):
    first = begin(one[0], *one[1], **one[2])
    wait_until_it_listens(port)
    second = begin(other[0], *other[1], **other[2])
    ((code, _, err),) = ends(second)
    assert code == 2, err
    assert text in err
    assert "HINT" in err
    first.terminate()
    ends(first)
    assert not (tmp_path / "run").exists()


@pytest.mark.wide
def test_two_jobs_on_one_port(begin, start, port, tmp_path):
    """The launcher of the other job is refused, and the job that owns the port waits on."""
    first = begin_in_slurm(start, port, tmp_path, job=7, rank=0)
    wait_until_it_listens(port)
    ((code, _, err),) = ends(begin_in_slurm(start, port, tmp_path, job=8, rank=1))
    assert code == 2
    assert "belongs to another job (slurm 8.0)" in err
    assert "HINT: two jobs use the same port" in err
    assert first.poll() is None
    for code, out, err in ends(first, begin_in_slurm(start, port, tmp_path, job=7, rank=1)):
        assert code == 0, out + err


def begin_in_slurm(start, port, tmp_path, *, job, rank):
    """A task of a SLURM job of two."""
    environ = {**SLURM, "SLURM_JOB_ID": str(job), "SLURM_PROCID": str(rank)}
    environ |= {"SLURM_NODEID": str(rank), "PODLIFT_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    return start(
        *(CONFIG, f"--workdir={tmp_path}/run", "--fake_devices=1"), environ={**ENVIRON, **environ}
    )


def test_a_rank_that_joins_twice(begin):
    launchers = [begin(0, size=3), begin(1, size=3)]
    time.sleep(1.0)
    launchers.append(begin(1, size=3))
    for code, _, err in ends(*launchers):
        assert code == 2, err
        assert "rank 1 joined twice" in err


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(begin, tmp_path, launch):
    """One host finds the run of before, the other does not."""
    for code, out, err in ends(begin(0), begin(1)):
        assert code == 0, out + err
    env = (tmp_path / "run/config.json").read_text()
    one, other = tmp_path / "a", tmp_path / "b"
    for folder in (one, other):
        folder.mkdir()
    (one / "config.json").write_text(env)
    # The same path, as two hosts would name it: a link that is moved between the two starts.
    link = tmp_path / "link"
    link.symlink_to(one)
    first = begin(0, workdir=link)
    wait_for_line(one / ".rendezvous", "\n")
    link.unlink()
    link.symlink_to(other)
    second = begin(1, workdir=link)
    ((code, _, err),) = ends(second)
    assert code == 2, err
    assert f"this host sees no {link}/.rendezvous" in err
    assert "All ranks need the same --workdir, in a folder that all hosts share" in err
    first.terminate()
    ((code, out, _),) = ends(first)
    assert code == 42
    assert "connection from 127.0.0.1: it does not have the secret of this job" in out


@pytest.mark.slow
def test_a_client_that_is_no_launcher_is_refused(begin, port):
    """Anyone may connect to the port; what they send is only data."""
    launcher = begin(0)
    wait_until_it_listens(port)
    for garbage in (
        b"GET / HTTP/1.0\r\n\r\n",
        b'{"kind": "bye"}\n',
        b"[]\n",
        b"\xff\xfe\n",
        b"{}\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(5)
            client.sendall(garbage)
            assert client.recv(1000) == b""
    ((code, out, err), (other, _, _)) = ends(launcher, begin(1))
    assert (code, other) == (0, 0), out + err


def test_the_port_is_open_to_this_machine_only(begin, port):
    launcher = begin(0)
    wait_until_it_listens(port)
    launcher.terminate()
    ends(launcher)
