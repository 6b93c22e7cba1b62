"""What is decided before anything is started: processes, devices, environments, limits."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from slurm_environ import SLURM

from launcher.cli.env import relevant
from launcher.command_line import flags
from launcher.exit_codes import RETRY
from launcher.launch.build import make_launch_spec
from launcher.launch.dry_run import describe_launch
from launcher.processes.assignment import Outcome
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import CONSEQUENCE, Failure, failure_from_exit, failure_from_outcome
from launcher.processes.progress_page import Progress
from launcher.rendezvous.connection import Connection
from launcher.rendezvous.root_cause import RootCause
from launcher.supervisor.attempt import AttemptResult
from launcher.supervisor.supervise import backoff_secs, why_not_again
from launcher.supervisor.watchdog import Watchdog
from launcher.worker.run import _outcome_of
from trainer.config.config_json import config_from_json
from trainer.config.keys import flatten
from trainer.errors import UserError

MLP = f"--config={ROOT}/configs/mlp.py"


def planned(tmp_path, *arguments, **environ):
    options = flags.parse(["launcher", MLP, f"--workdir={tmp_path}/run", *arguments])
    return make_launch_spec(options, {"HOME": str(tmp_path), **environ})


def test_one_process_runs_in_place_and_more_are_supervised(tmp_path):
    assert not planned(tmp_path).supervised
    assert planned(tmp_path, "--max_restarts=1").supervised
    assert planned(tmp_path, "--hang_timeout_secs=60").supervised
    two = planned(tmp_path, "--processes=2", "--fake_devices=2")
    assert two.supervised
    assert [worker.rank for worker in two.workers] == [0, 1]
    for worker in two.workers:
        assert "device_count=2" in worker.environ["XLA_FLAGS"]
        assert worker.environ["JAX_PLATFORMS"] == "cpu"


def test_processes_share_the_gpus(tmp_path):
    shares = planned(tmp_path, "--processes=2", CUDA_VISIBLE_DEVICES="4,5,6,7")
    visible = [worker.environ["CUDA_VISIBLE_DEVICES"] for worker in shares.workers]
    assert visible == ["4,5", "6,7"]
    with pytest.raises(UserError, match="--processes=4 cannot share 3 GPUs equally"):
        planned(tmp_path, "--processes=4", CUDA_VISIBLE_DEVICES="0,1,2")
    on_cpu = planned(tmp_path, "--processes=2", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="0,1,2")
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu.workers[0].environ


REFUSED = [
    (["--max_restarts=3"], SLURM, "is for a job on this machine alone"),
    (["--processes=2"], SLURM, "slurm has started 2 processes already"),
    (["--process_id=1", "--processes=2"], {}, "exclude each other"),
    (["--process_id=1"], {}, "--coordinator_address and --num_processes are missing"),
    (["--cluster=slurm"], {}, "--cluster=slurm, but SLURM_JOB_ID"),
    (["--cluster=slrm"], {}, "there is no such cluster"),
    (["--processes=3", "--fake_devices=4"], {}, "120 or 132"),
    (["--processes=2", "--log_ranks=0,2"], {}, "there is no rank 2 of 2"),
    (["--log_ranks=first"], {}, "neither all nor numbers"),
    (["--config.devices_per_process=0"], {}, "at least 1"),
]


@pytest.mark.parametrize(("arguments", "environ", "text"), REFUSED)
def test_what_cannot_be_is_refused(tmp_path, arguments, environ, text):
    with pytest.raises(UserError) as error:
        planned(tmp_path, *arguments, **environ)
    assert text in str(error.value)


def test_a_place_in_a_cluster(tmp_path):
    made = planned(tmp_path, "--fake_devices=2", **SLURM)
    assert made.num_processes == 2
    assert [worker.rank for worker in made.workers] == [1]
    assert "rank 0 at n1:" in describe_launch(made, SLURM)
    alone = planned(tmp_path, "--cluster=none", **SLURM)
    assert alone.num_processes == 1
    options = flags.parse(["launcher", MLP])
    with pytest.raises(UserError, match="--workdir is missing: slurm has 2 processes"):
        make_launch_spec(options, SLURM)


def test_the_config_reaches_the_workers_whole(tmp_path):
    made = planned(tmp_path, "--processes=2")
    again = config_from_json(made.config)
    assert flatten(again.to_dict()) == flatten(made.settings.config.to_dict())
    assert again.get_type("num_steps") is int


def test_dry_run_starts_and_writes_nothing(launch, tmp_path):
    workdir = tmp_path / "run"
    code, out, err = launch(
        MLP, f"--workdir={workdir}", "--dry_run", "--processes=2", "--fake_devices=4"
    )
    assert code == 0, err
    for text in (
        "2, 2 of them started here",
        "8 devices (4 a process)",
        "64 a process, 16 a device",
    ):
        assert text in out, out
    assert out.count("device_count=4") == 2
    assert not workdir.exists()


def test_the_launcher_imports_no_jax():
    code = (
        "import sys, launcher.supervisor.supervise, launcher.launch.build, launcher.cli.env; "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_env_for_a_bug_report(launch):
    code, out, _ = launch("env", environ={"SLURM_JOB_ID": "1", "PODLIFT_API_TOKEN": "hush"})
    assert code == 0
    for text in (
        "python ",
        "jax ",
        "devices      1 cpu cpu",
        "cluster      none",
        "SLURM_JOB_ID=1",
    ):
        assert text in out, out
    assert "hush" not in out
    assert relevant({"NCCL_DEBUG": "INFO", "HOME": "x", "JAX_SECRET": "y"}) == {
        "NCCL_DEBUG": "INFO"
    }


# The first failure is the story


def test_the_cause_comes_before_its_consequences():
    gloo = Outcome(1, "JaxRuntimeError on rank 0: Gloo", lost_peer=True)
    seen = [
        failure_from_outcome(gloo, 0, "log"),
        failure_from_exit(-6, 2, 7, "log", "jax: distributed service detected fatal errors", False),
        failure_from_exit(-9, 1, 7, "log", "", False),
    ]
    assert seen[1].weight == CONSEQUENCE
    assert story_of(*seen).rank == 1
    assert story_of(*seen).exit_code == 42
    lost = story_of(*seen[:2])
    assert (lost.rank, lost.exit_code) == (0, 42)
    assert lost.message.startswith("rank 0 lost contact to its peers (JaxRuntimeError on rank 0")


def test_an_error_of_the_network_is_a_lost_peer_only_where_jax_raised_it_and_there_are_peers():
    def outcome(error, has_peers):
        def train():
            raise error

        return _outcome_of(train, 0, has_peers=has_peers)

    gloo = RuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert outcome(gloo, True).lost_peer
    assert not outcome(gloo, False).lost_peer
    of_the_data = outcome(ConnectionResetError(104, "Connection reset by peer"), True)
    assert not of_the_data.lost_peer
    assert "ConnectionResetError" in of_the_data.trace


def test_what_a_message_sets_off_is_not_the_fault_of_who_sent_it():
    lost = []

    def claim(message):
        raise OSError(28, "No space left on device")

    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    with EventLoop() as loop, theirs:
        link = Connection(loop, ours, claim, lost.append)
        theirs.sendall(b'{"kind": "start"}\n')
        with pytest.raises(OSError, match="No space left"):
            loop.run(lambda: bool(lost))
        assert lost == []
        theirs.sendall(b"hello\n")
        loop.run(lambda: bool(lost))
        assert lost == ["it does not speak as a launcher does"]
        link.close()


def test_of_ranks_that_hang_the_one_furthest_behind_is_the_story():
    hangs = [Failure(rank, 42, "", count=count) for rank, count in ((0, 29), (1, 22), (2, 29))]
    assert story_of(*hangs).rank == 1
    assert story_of(*hangs, Failure(2, 1, "raised")).rank == 2


def story_of(*failures):
    """The verdict on failures that are all seen within a moment."""
    stories = []
    with EventLoop() as loop:
        verdict = RootCause(loop, stories.append, consequence_secs=0.2, hang_secs=0.2)
        for failure in failures:
            verdict.add(failure)
        loop.run(lambda: bool(stories))
    return stories[0]


@pytest.mark.parametrize(
    ("returncode", "code", "text"),
    [
        (-9, 42, "killed by SIGKILL around step 7: the kernel ran out of memory"),
        (-15, 42, "killed by SIGTERM"),
        (-11, 1, "killed by SIGSEGV"),
        (-6, 1, "killed by SIGABRT"),
        (3, 1, "exited with code 3 without a word"),
        (0, 1, "exited with code 0 without a word"),
    ],
)
def test_what_an_end_without_a_word_means(returncode, code, text):
    failure = failure_from_exit(returncode, 1, 7, "log", "", out_of_memory=True)
    assert failure.exit_code == code
    assert text in failure.message


def failed(code, step=5, **values):
    return AttemptResult(code, failure=Failure(0, code, "", step=step), **values)


RESTARTS = [
    ("done", AttemptResult(0), None, None),
    ("usage", failed(2), None, None),
    ("raised", failed(1), None, "again"),
    ("raised twice at a step", failed(1), failed(1), None),
    ("raised at another step", failed(1), failed(1, step=4), "again"),
    ("killed", failed(42), None, "again"),
    ("killed twice at a step", failed(42), failed(42), "again"),
    ("asked to stop, and saved", AttemptResult(42, asked_to_stop=True), None, None),
    ("one rank was asked to stop", AttemptResult(42), None, None),
    ("asked to stop, and failed", failed(1, asked_to_stop=True), None, None),
    ("Ctrl-C twice", AttemptResult(130, asked_to_stop=True), None, None),
]


@pytest.mark.parametrize(
    ("what", "ending", "before", "then"), RESTARTS, ids=[r[0] for r in RESTARTS]
)
def test_what_is_tried_again(what, ending, before, then):
    previous = before.failure if before else None
    assert (why_not_again(ending, previous, 0, 3) is None) == (then == "again")
    if then == "again":
        assert "no restart left" in why_not_again(ending, previous, 3, 3)
        assert why_not_again(ending, previous, 0, 0) == ""


def test_restarts_wait_longer_each_time():
    at_start = Failure(1, RETRY, "killed", step=0)
    assert [backoff_secs(n, at_start) for n in (0, 1, 2, 9)] == [1, 2, 4, 60]
    later = Failure(1, RETRY, "killed", step=7)
    assert [backoff_secs(n, later) for n in (0, 1, 2, 9)] == [0, 2, 4, 60]


def test_the_watchdog_is_patient_where_things_take_long():
    watchdog = Watchdog(timeout=60)

    def look(now, *said):
        return watchdog.look({rank: Progress(*p) for rank, p in enumerate(said)}, now)

    assert look(0, (1, 0, "compile"), (1, 0, "compile")) is None
    assert look(590, (1, 0, "compile"), (1, 0, "compile")) is None
    assert look(591, (2, 1, "train"), (2, 1, "train")) is None
    assert look(650, (9, 8, "train"), (7, 6, "train")) is None
    assert look(700, (9, 8, "train"), (7, 6, "train")) is None
    stuck = look(711, (9, 8, "train"), (7, 6, "train"))
    assert (stuck.rank, stuck.progress.step, stuck.seconds) == (1, 6, 61)
    # A rank that has ended is not waited for.
    assert watchdog.look({0: Progress(10, 8, "save")}, 800) is None
