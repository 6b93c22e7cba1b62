"""The scripts that start podlift in other places, with stand-ins for what runs there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import kubernetes_validate as validate
import pytest
import yaml
from conftest import ROOT

SCRIPTS = ROOT / "scripts"
FAKE_DEVICES, SLURM, MPI = "fake_devices.sh", "slurm.sbatch", "mpi.sh"
TPU_POD, RENDER = "tpu_pod.sh", "k8s/render.sh"
MLP = "--config=configs/mlp.py"
HOSTILE = (
    """--config.note=it's "q" $HOME $(PODLIFT_JOB_NAME) `id` \\ & @NAME@ # é: [x] {y} %s\n\t*"""
)


@pytest.fixture
def run(tmp_path):
    """Runs a script to its end, with stand-ins on PATH and nothing of this machine's settings."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()

    def run_script(script, *arguments, stdin="", cwd=ROOT, **environ):
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *map(str, arguments)],
            env=run_script.environ | {name: str(value) for name, value in environ.items()},
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def stand_in(name, text):
        """An executable in place of `name`; `record` in it appends its arguments to NAME.log."""
        path = stand_ins / name
        record = f'record() {{ python3 -c "import json,sys; print(json.dumps(sys.argv[1:]))" "$@" \
>>{shlex.quote(str(tmp_path / name))}.log; }}\n'
        path.write_text(f"#!/usr/bin/env bash\n{record}{text}\n")
        path.chmod(0o755)
        return path

    def calls(name):
        log = tmp_path / f"{name}.log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    ours = ("PODLIFT_", "SLURM_", "OMPI_", "PRTE_", "XLA_", "JAX_", "NCCL_", "PJRT_")
    run_script.environ = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    run_script.environ["PATH"] = f"{stand_ins}:{os.environ['PATH']}"
    run_script.stand_in, run_script.calls = stand_in, calls
    return run_script


def only(calls):
    assert len(calls) == 1, calls
    return calls[0]


@pytest.mark.parametrize("script", [FAKE_DEVICES, SLURM, MPI, TPU_POD, RENDER])
def test_help(run, script):
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"scripts/{script}" in done.stdout
    assert "--dry-run" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


RENDERED = [RENDER, "--name=mlp", "--image=i", "--kind=tpu", "--workdir=gs://b/r", MLP]
POD = [TPU_POD, "run", "pod", "--zone=us-west4-a"]


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ([FAKE_DEVICES], "number of devices is missing"),
        ([FAKE_DEVICES, MLP], "is not a number of devices"),
        ([FAKE_DEVICES, "0", MLP], "0 is not a number"),
        ([SLURM, "--dry-run"], "--config is missing"),
        ([SLURM, MLP], "not a SLURM job"),
        ([MPI, MLP], "number of ranks is missing"),
        ([MPI, "-n", "two", MLP], "-n two is not"),
        ([MPI, "-n"], "-n needs a value"),
        ([MPI, "-n", "2"], "--config is missing"),
        ([MPI, "-n", "2", MLP, "-H", "a"], "-H comes too late"),
        ([MPI, "-n", "2", "-H", "a", "--hostfile", "/dev/null", MLP], "given twice"),
        ([MPI, "-n", "2", "--hostfile", "/nowhere", MLP], "no file /nowhere"),
        ([TPU_POD], "what to do is missing"),
        ([TPU_POD, "make", "pod"], "make is not"),
        ([TPU_POD, "create", "My Pod"], "'My Pod' is not a name"),
        ([TPU_POD, "create", "--zone=x"], "'--zone=x' is not a name"),
        ([TPU_POD, "create", "pod"], "--zone is missing"),
        ([TPU_POD, "create", "pod", "--zone=a", "--yes"], "create does not take --yes"),
        ([*POD, "--workdir=gs://b/r", "--dry-run"], "--config is missing"),
        ([*POD, MLP, "--workdir=runs/x", "--dry-run"], "folder that all hosts share"),
        ([*RENDERED, "--name=My_Job"], "'My_Job' is not a name"),
        ([*RENDERED, "--name=a\nb"], "is not a name"),
        ([*RENDERED, "--name=" + "a" * 43], "is not a name"),
        ([*RENDERED, '--image=i"'], "is not an image"),
        ([*RENDERED, "--kind=cpu"], "is not tpu or gpu"),
        ([*RENDERED, "--hosts=0"], "--hosts=0"),
        ([*RENDERED, "--hosts=2"], "4x4 has 16 chips, but --hosts=2 with --chips=4 have 8"),
        ([*RENDERED, "--topology=4x"], "is not a topology"),
        ([*RENDERED, "--workdir=/data"], "not a folder that all pods share"),
        ([*RENDERED, "--claim=disk"], "is not on the claim"),
        ([*RENDERED, "--claim=a b"], "not a name in Kubernetes"),
        ([*RENDERED, "--max_restarts=1"], "there is no option --max_restarts"),
        ([*RENDERED, "--accelerator=a: b"], "is not a label"),
        ([*RENDERED, "--", "\x07"], "control character"),
    ],
)
def test_a_mistake_gets_one_error_and_a_hint(run, command, error):
    done = run(*command)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert error in done.stderr
    assert lines[-1].startswith("  HINT: ")
    assert done.stdout == ""


# This machine


def test_fake_devices_keep_other_flags(run, tmp_path):
    """The script next to a train.sh that tells what it was given."""
    folder = tmp_path / "it's here" / "scripts"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPTS / FAKE_DEVICES, folder)
    (folder / "train.sh").write_text('#!/bin/sh\nprintf "%s\\n" "$XLA_FLAGS" "$JAX_PLATFORMS" "$@"')
    (folder / "train.sh").chmod(0o755)
    flags = "--xla_a=1  --xla_force_host_platform_device_count=2 --xla_b=*"
    done = run(folder / FAKE_DEVICES, 8, MLP, "--config.x=a b", XLA_FLAGS=flags)
    assert done.returncode == 0, done
    count = "--xla_force_host_platform_device_count=8"
    assert done.stdout.splitlines() == [
        f"--xla_a=1 --xla_b=* {count}",
        "cpu",
        MLP,
        "--config.x=a b",
    ]
    assert run(folder / FAKE_DEVICES, 8, MLP).stdout.splitlines()[0] == count


def test_fake_devices_dry_run(run):
    done = run(FAKE_DEVICES, 4, MLP, "--dry-run", XLA_FLAGS="--xla_a=1")
    flags, platform, script, config = shlex.split(done.stdout)
    assert flags == "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4"
    assert (platform, script) == ("JAX_PLATFORMS=cpu", str(SCRIPTS / "train.sh"))
    assert config == MLP


# SLURM


@pytest.fixture
def job(run, tmp_path):
    """Runs the batch script with a srun that runs one task and returns what it is told."""
    run.stand_in("python", 'record "$@"; exit "${TASK:-0}"')
    run.stand_in(
        "srun",
        'record "$@"; while [[ $1 == --* ]]; do shift; done; code=0; "$@" || code=$?\n'
        '[[ -z ${HANG:-} ]] || sleep 1; exit "${STEP:-$code}"',
    )
    run.stand_in("scancel", 'record "$@"')
    run.stand_in("squeue", 'record "$@"; echo "${STATE-RUNNING}"')
    run.stand_in("scontrol", 'record "$@"; exit "${SCONTROL:-0}"')

    def run_job(*arguments, **environ):
        given = {
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": tmp_path,
            "PODLIFT_PYTHON": tmp_path / "bin" / "python",
        }
        done = run(SLURM, *(arguments or [MLP]), cwd=tmp_path, **(given | environ))
        assert not list(tmp_path.glob("*.failed"))
        return done

    run_job.calls = run.calls
    return run_job


REQUEUE = ["requeue", "77"]


@pytest.mark.parametrize(
    ("environ", "code", "requeued", "says"),
    [
        ({}, 0, False, ""),
        ({"TASK": 1}, 1, False, ""),
        ({"TASK": 2}, 2, False, ""),
        ({"TASK": 127}, 127, False, ""),
        ({"TASK": 42}, 42, True, "asked to stop; requeuing job 77"),
        ({"STEP": 137}, 42, True, "a task was killed (code 137); requeuing job 77"),
        ({"STEP": 143}, 42, True, "requeuing"),
        # One task failed, and the others were ended because of it.
        ({"TASK": 1, "STEP": 42}, 1, False, ""),
        ({"TASK": 2, "STEP": 137}, 2, False, ""),
        ({"TASK": 42, "SLURM_RESTART_COUNT": 99}, 42, True, "requeuing"),
        ({"TASK": 42, "SLURM_RESTART_COUNT": 100}, 42, False, "requeued 100 times already"),
        ({"TASK": 42, "PODLIFT_MAX_REQUEUES": 0}, 42, False, "requeued 0 times already"),
        ({"TASK": 42, "STATE": "COMPLETING"}, 42, False, "COMPLETING and not requeued"),
        ({"TASK": 42, "STATE": ""}, 42, False, "gone and not requeued"),
        ({"TASK": 42, "SCONTROL": 1}, 42, True, "scontrol requeue 77 failed"),
    ],
)
def test_what_slurm_requeues(job, environ, code, requeued, says):
    done = job(**environ)
    assert done.returncode == code, done
    assert job.calls("scontrol") == ([REQUEUE] if requeued else [])
    assert says in done.stderr
    if not says:
        assert done.stderr == ""


def test_slurm_passes_arguments_and_a_workdir(job, tmp_path):
    assert job(MLP, HOSTILE).returncode == 0
    expected = ["-m", "launcher", MLP, HOSTILE, f"--workdir={tmp_path}/runs/slurm-77"]
    assert only(job.calls("python")) == expected
    options = [option for option in only(job.calls("srun")) if option.startswith("--")][:2]
    assert options == ["--kill-on-bad-exit=1", "--wait=60"]


def test_slurm_keeps_a_workdir_that_is_given(job, tmp_path):
    job(MLP, "--workdir=/shared/run")
    job(MLP, "--workdir", "/shared/run")
    job(MLP, PODLIFT_RUNS="/shared/all runs")
    given, apart, default = (call[3:] for call in job.calls("python"))
    assert given == ["--workdir=/shared/run"]
    assert apart == ["--workdir", "/shared/run"]
    assert default == ["--workdir=/shared/all runs/slurm-77"]


def test_slurm_array_takes_a_run_of_a_sweep_each(job, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "2"}
    done = job(MLP, "--sweep_index=$SLURM_ARRAY_TASK_ID", TASK=42, **array)
    assert done.returncode == 42
    sweep = ["--sweep_index=2", f"--workdir={tmp_path}/runs/slurm-75"]
    assert only(job.calls("python")) == ["-m", "launcher", MLP, *sweep]
    assert only(job.calls("scontrol")) == ["requeue", "75_2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_forwards_signals_to_the_tasks(run, job, tmp_path, number):
    run.stand_in("python", f"touch {tmp_path}/started; sleep 2; exit 42")
    environ = {
        **run.environ,
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "PODLIFT_PYTHON": str(tmp_path / "bin/python"),
    }
    with subprocess.Popen(["bash", str(SCRIPTS / SLURM), MLP], env=environ, cwd=tmp_path) as shell:
        wait_for((tmp_path / "started").exists)
        shell.send_signal(number)
        assert shell.wait(20) == 42
    assert only(run.calls("scancel")) == ["--signal=TERM", "77"]
    assert only(run.calls("scontrol")) == REQUEUE


def test_slurm_finds_the_checkout_or_says_so(job, tmp_path):
    done = job(PODLIFT_PYTHON="")
    assert done.returncode == 2
    assert f"there is no podlift in {tmp_path}" in done.stderr
    assert "PODLIFT_HOME" in done.stderr
    done = job(PODLIFT_PYTHON="", PODLIFT_HOME=ROOT, PODLIFT_VENV="/nowhere")
    assert done.returncode == 2
    assert "there is no /nowhere/bin/python" in done.stderr
    assert job.calls("srun") == []


def test_slurm_dry_run(run):
    done = run(SLURM, "--dry-run", MLP, HOSTILE, PODLIFT_PYTHON="/my python")
    words = shlex_of_bash(done.stdout)
    assert words[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert words[-6:-1] == ["/my python", "-m", "launcher", MLP, HOSTILE]
    assert words[-1] == f"--workdir={ROOT}/runs/slurm-JOB"


def test_slurm_defaults_come_before_any_command():
    lines = (SCRIPTS / SLURM).read_text().splitlines()
    head = [line for line in lines[: lines.index("set -euo pipefail")] if line]
    assert all(line.startswith("#") for line in head)
    assert {line.partition("=")[0] for line in head if line.startswith("#SBATCH")} == {
        "#SBATCH --job-name",
        "#SBATCH --output",
        "#SBATCH --open-mode",
        "#SBATCH --requeue",
        "#SBATCH --signal",
    }


# Open MPI


def mpi_environ(run, **environ):
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return as_root | {"PODLIFT_PYTHON": "/my python"} | environ


@pytest.mark.parametrize(("rank", "expected"), [(0, 0), (1, 1), (2, 2), (42, 42), (137, 42)])
def test_mpi_on_one_machine(run, rank, expected):
    run.stand_in("mpirun", f'record "$@"; exit {rank}')
    done = run(MPI, "-n", 3, "--", MLP, HOSTILE, **mpi_environ(run, XLA_FLAGS="--xla_a"))
    assert done.returncode == expected, done
    *given, workdir = only(run.calls("mpirun"))
    assert given == [
        *["-n", "3", "-x", "XLA_FLAGS", "-x", "PODLIFT_PYTHON"],
        *["/my python", "-m", "launcher", MLP, HOSTILE],
    ]
    assert workdir.startswith("--workdir=runs/mpi-2")  # one for all ranks, with the time


def test_mpi_keeps_the_workdir_that_is_given(run):
    run.stand_in("mpirun", 'record "$@"')
    run(MPI, "-n", 3, MLP, "--workdir=x", **mpi_environ(run))
    assert only(run.calls("mpirun"))[-2:] == [MLP, "--workdir=x"]


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
def test_mpi_tells_where_rank_0_is(run, tmp_path, hosts, first, by_file):
    """Open MPI puts it on this machine if that takes part, wherever it stands in the list."""
    here = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    hosts = hosts.replace("HERE", here)
    where = ["-H", hosts]
    if by_file:
        lines = ["# comment", "", *(host.replace(":", " slots=") for host in hosts.split(","))]
        (tmp_path / "hosts").write_text("\n".join(lines))
        where = ["--hostfile", tmp_path / "hosts"]
    run.stand_in("mpirun", 'record "$@"; echo "${PODLIFT_COORDINATOR_ADDRESS-none}"')
    done = run(MPI, "-n", 2, *where, MLP, **mpi_environ(run))
    address = done.stdout.strip()
    if first is None:
        assert address == "none"
        assert "PODLIFT_COORDINATOR_ADDRESS" not in only(run.calls("mpirun"))
    else:
        assert re.fullmatch(re.escape(first.replace("HERE", here)) + ":2[0-9]{4}", address)
        assert "PODLIFT_COORDINATOR_ADDRESS" in only(run.calls("mpirun"))
    given = run(
        MPI, "-n", 2, *where, MLP, **mpi_environ(run, PODLIFT_COORDINATOR_ADDRESS="me:1234")
    )
    assert given.stdout.strip() == "me:1234"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_mpi_asks_the_ranks_to_save(run, tmp_path, number):
    run.stand_in(
        "mpirun",
        f"trap 'record USR1; sleep 1; exit 42' USR1; trap 'record TERM; exit 1' TERM INT\n"
        f"touch {tmp_path}/started; while true; do sleep 0.1; done",
    )
    with start_mpi(run) as script:
        wait_for((tmp_path / "started").exists)
        # A terminal sends Ctrl-C to all that the script has started and not put aside.
        os.killpg(script.pid, number)
        assert script.wait(20) == 42
    assert run.calls("mpirun") == [["USR1"]]


def test_mpi_does_not_wait_after_a_second_interrupt(run, tmp_path):
    run.stand_in(
        "mpirun",
        f"trap 'record USR1' USR1; trap 'record TERM; exit 1' TERM\n"
        f"touch {tmp_path}/started; while true; do sleep 0.1; done",
    )
    with start_mpi(run) as script:
        wait_for((tmp_path / "started").exists)
        os.killpg(script.pid, signal.SIGINT)
        wait_for(lambda: run.calls("mpirun") == [["USR1"]])
        os.killpg(script.pid, signal.SIGINT)
        assert script.wait(20) == 130
    assert run.calls("mpirun") == [["USR1"], ["TERM"]]


def start_mpi(run):
    return subprocess.Popen(
        ["bash", str(SCRIPTS / MPI), "-n", "2", MLP],
        env=run.environ | mpi_environ(run),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused")
def test_mpi_as_root_is_for_the_user_to_allow(run):
    run.stand_in("mpirun", 'record "$@"')
    done = run(MPI, "-n", 2, MLP, PODLIFT_PYTHON="python")
    assert done.returncode == 2
    assert "OMPI_ALLOW_RUN_AS_ROOT=1" in done.stderr
    assert run.calls("mpirun") == []


def test_mpi_dry_run(run):
    done = run(MPI, "-n", 2, "--dry-run", "-H", "a,b", MLP, PODLIFT_PYTHON="/my python")
    address, *words = shlex.split(done.stdout)
    assert re.fullmatch("PODLIFT_COORDINATOR_ADDRESS=a:2[0-9]{4}", address)
    assert words[:5] == ["mpirun", "-n", "2", "-H", "a,b"]
    assert words[-4:] == ["/my python", "-m", "launcher", MLP]


# TPU VMs

TPU_VM = ["compute", "tpus", "tpu-vm"]
ZONE = "--zone=us-west4-a"


def test_tpu_create_and_delete(run):
    run.stand_in("gcloud", 'record "$@"')
    assert run(TPU_POD, "create", "pod", ZONE).returncode == 0
    options = ["--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot", "--project=p"]
    assert run(TPU_POD, "create", "pod", ZONE, *options).returncode == 0
    assert run(TPU_POD, "delete", "pod", ZONE, stdin="").returncode == 2
    assert run(TPU_POD, "delete", "pod", ZONE, stdin="n\n").returncode == 2
    assert run(TPU_POD, "delete", "pod", ZONE, stdin="y\n").returncode == 0
    assert run(TPU_POD, "delete", "pod", ZONE, "--yes", "--project=p").returncode == 0
    default = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert run.calls("gcloud") == [
        [*TPU_VM, "create", "pod", ZONE, *default],
        [*TPU_VM, "create", "pod", ZONE, "--project=p", *options[:3]],
        [*TPU_VM, "delete", "pod", ZONE, "--quiet"],
        [*TPU_VM, "delete", "pod", ZONE, "--project=p", "--quiet"],
    ]


def test_tpu_run_copies_installs_and_starts(run, tmp_path):
    """A gcloud that does on this machine, in a folder, what it would do on each host."""
    host = tmp_path / "host"
    (host / "podlift-venv/bin").mkdir(parents=True)
    run.stand_in(
        "gcloud",
        f'record "$@"; cd {host}\ncase $4 in scp) cp "$5" podlift.tar.gz ;;\n'
        'ssh) for a in "$@"; do [[ $a != --command=* ]] || exec bash -c "${a#*=}"; done ;; esac',
    )
    run.stand_in("python3", f'[[ $1 == -c ]] && exec {sys.executable} "$@"; record "$@"')
    python = run.stand_in(
        "host-python",
        f'pwd >{host}/cwd; record "$@"; echo trained\n'
        f"for i in {{1..200}}; do [[ ! -e {host}/end ]] || exit 42; sleep 0.1; done",
    )
    (host / "podlift-venv/bin/python").symlink_to(python)
    workdir = "--workdir=gs://bucket/run"
    done = run(TPU_POD, "run", "pod", ZONE, workdir, MLP, HOSTILE)
    assert done.returncode == 0, done
    # It returns while the training goes on, though it reads all that ssh prints.
    assert not (host / "podlift.exit").exists()
    (host / "end").touch()
    wait_for((host / "podlift.exit").exists)
    wait_for((host / "podlift.exit").read_text)
    assert only(run.calls("host-python")) == ["-m", "launcher", workdir, MLP, HOSTILE]
    assert (host / "cwd").read_text().strip() == str(host / "podlift")
    assert (host / "podlift/launcher/__main__.py").exists()
    scp, install, start = run.calls("gcloud")
    assert scp[:4] + scp[5:] == [*TPU_VM, "scp", "pod:podlift.tar.gz", ZONE, "--worker=all"]
    for call in (install, start):
        assert call[:-1] == [*TPU_VM, "ssh", "pod", ZONE, "--worker=all"]
        assert call[-1].startswith("--command=")
    assert only(run.calls("python3"))[:4] == ["-m", "uv", "pip", "install"]
    logs = run(TPU_POD, "logs", "pod", ZONE, "--worker=3")
    assert logs.stdout.splitlines() == ["trained", "exit code: 42"]
    assert "--worker=3" in run.calls("gcloud")[-1]


def test_tpu_run_does_not_disturb_one_that_is_going_on_and_stop_ends_it(run, tmp_path):
    host = tmp_path / "host"
    host.mkdir()
    run.stand_in(
        "gcloud",
        f'cd {host}\n[[ $4 == scp ]] || for a in "$@"; do\n'
        '[[ $a != --command=* ]] || exec bash -c "${a#*=}"; done',
    )
    with subprocess.Popen(["sleep", "60"]) as going_on:
        (host / "podlift.pid").write_text(f"{going_on.pid}\n")
        done = run(TPU_POD, "run", "pod", ZONE, "--workdir=gs://b/r", MLP)
        assert done.returncode == 2
        assert "a run is going on here" in done.stderr
        assert run(TPU_POD, "stop", "pod", ZONE).returncode == 0
        assert going_on.wait(10) == -signal.SIGTERM


def test_tpu_dry_run(run):
    run.stand_in("gcloud", 'record "$@"')
    done = run(TPU_POD, "run", "pod", ZONE, "--workdir=gs://b/r", MLP, HOSTILE, "--dry-run")
    archive, scp, install, start = done.stdout.splitlines()
    assert "archive" in archive
    assert shlex_of_bash(scp)[:5] == ["gcloud", *TPU_VM, "scp"]
    assert "tar -xzf" in install
    assert shlex_of_bash(start)[-1].startswith("--command=cd podlift\nexec </dev/null")
    for action in ("create", "logs", "stop", "delete"):
        assert run(TPU_POD, action, "pod", ZONE, "--dry-run").stdout.startswith("gcloud compute")
    assert run.calls("gcloud") == []


def test_gcloud_knows_the_flags(run, tmp_path):
    real = shutil.which("gcloud")
    if real is None:
        pytest.skip("there is no gcloud")
    run.stand_in("gcloud", 'record "$@"')
    run(TPU_POD, "create", "pod", ZONE, "--spot")
    run(TPU_POD, "logs", "pod", ZONE)
    run(TPU_POD, "delete", "pod", ZONE, "--yes")
    run(TPU_POD, "run", "pod", ZONE, MLP, "--workdir=gs://b/r", "--dry-run")
    wanted = {"scp": {"--zone", "--worker"}}
    for call in run.calls("gcloud"):
        flags = {word.partition("=")[0] for word in call if word.startswith("--")}
        wanted.setdefault(call[3], set()).update(flags)
    assert set(wanted) == {"create", "ssh", "scp", "delete"}
    for action, flags in wanted.items():
        page = subprocess.run(
            [real, *TPU_VM, action, "--help"],
            env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "PAGER": "cat"},
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        if "SYNOPSIS" not in re.sub("\x1b\\[[0-9;]*m", "", page):
            pytest.skip("this gcloud shows no help")
        for flag in flags:
            assert flag in page, f"{action} {flag}"


# Kubernetes


def rendered(run, *arguments, **options):
    done = run(*RENDERED, *arguments, **options)
    assert done.returncode == 0, done
    return yaml.safe_load(done.stdout)


def container_of(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]
    return job["spec"]["template"]["spec"]["containers"][0]


def env_of(jobset):
    return {entry["name"]: entry.get("value") for entry in container_of(jobset)["env"]}


KINDS = {
    "tpu": [],
    "multislice": ["--slices=2", "--topology=2x2x4", "--accelerator=tpu-v5p-slice"],
    "as root": ["--user=0"],
    "gpu": ["--kind=gpu"],
    "gpu, everything": [
        *["--kind=gpu", "--hosts=3", "--gpus=4", "--accelerator=nvidia-h100-80gb"],
        *["--claim=disk", "--workdir=/runs/x", "--account=trainer", "--slices=2"],
    ],
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_the_job_is_one_that_kubernetes_takes(run, arguments):
    job = rendered(run, *arguments)["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}
    validate.validate(job, validate.latest_version(), strict=True)
    job["spec"]["backofLimit"] = 0
    with pytest.raises(validate.ValidationError):
        validate.validate(job, validate.latest_version(), strict=True)


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_the_jobset(run, arguments):
    jobset = rendered(run, *arguments)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(jobset["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    pod, container, env = job["template"]["spec"], container_of(jobset), env_of(jobset)
    # What launcher.clusters.kubernetes reads.
    assert env["PODLIFT_NUM_PROCESSES"] == str(job["completions"] * replicated["replicas"])
    assert env["PODLIFT_PODS_PER_JOB"] == str(job["completions"])
    assert env["PODLIFT_JOB_NAME"] == jobset["metadata"]["name"]
    subdomain = jobset["spec"]["network"]["subdomain"]
    assert env["PODLIFT_COORDINATOR_ADDRESS"] == f"mlp-train-0-0.{subdomain}:8476"
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in container["env"]
        if "valueFrom" in entry
    }
    assert fields["PODLIFT_JOB_INDEX"] == "metadata.labels['jobset.sigs.k8s.io/job-index']"
    assert fields["PODLIFT_RESTART_ATTEMPT"].endswith("'jobset.sigs.k8s.io/restart-attempt']")
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    user = pod["securityContext"]["runAsUser"]
    assert pod["securityContext"]["runAsNonRoot"] is (user != 0)
    assert ("add" in container["securityContext"]["capabilities"]) is (user == 0)
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_values_for_tpus_and_gpus(run):
    tpu = rendered(run)
    assert container_of(tpu)["resources"]["limits"] == {"google.com/tpu": "4"}
    pod = tpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert "MEGASCALE_NUM_SLICES" not in env_of(tpu)
    slices = rendered(run, *KINDS["multislice"])
    assert env_of(slices)["MEGASCALE_NUM_SLICES"] == "2"
    assert env_of(slices)["MEGASCALE_COORDINATOR_ADDRESS"] == "mlp-train-0-0.mlp"
    gpu = rendered(run, *KINDS["gpu, everything"])
    assert container_of(gpu)["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert "annotations" not in gpu["metadata"]
    assert "MEGASCALE_NUM_SLICES" not in env_of(gpu)
    pod = gpu["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["serviceAccountName"] == "trainer"
    assert {"name": "runs", "mountPath": "/runs"} in container_of(gpu)["volumeMounts"]
    pod = rendered(run, "--kind=gpu")["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "nodeSelector" not in pod["template"]["spec"]


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (1, "FailJobSet"),
        (2, "FailJobSet"),
        (42, "RestartJobSet"),
        (137, "RestartJobSet"),
        (139, "FailJobSet"),
    ],
)
def test_what_a_jobset_starts_again(run, code, action):
    """The rules of the Job controller and of JobSet, in their order."""
    spec = rendered(run)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    reason = "BackoffLimitExceeded"
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container_of({"spec": spec})["name"]
    assert rule["onExitCodes"]["operator"] == "In"
    if code in rule["onExitCodes"]["values"]:
        reason = "PodFailurePolicy"
    rules = spec["failurePolicy"]["rules"]
    first = next(
        rule
        for rule in rules
        if "onJobFailureReasons" not in rule or reason in rule["onJobFailureReasons"]
    )
    assert first["action"] == action
    assert spec["failurePolicy"]["maxRestarts"] == 100
    for rule in rules:
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])


def test_values_cannot_leave_their_place_in_a_manifest(run):
    jobset = rendered(run, "--workdir=gs://b/@IMAGE@", "--", HOSTILE, "a: b", "- c", "")
    plain = rendered(run)
    arguments = container_of(jobset)["args"]
    # Kubernetes makes a $ of $$, and leaves what follows alone.
    assert [argument.replace("$$", "$") for argument in arguments] == [
        *[MLP, "--workdir=gs://b/@IMAGE@", HOSTILE, "a: b", "- c", ""],
    ]
    assert "$" not in "".join(arguments).replace("$$", "")
    container_of(jobset)["args"] = container_of(plain)["args"]
    assert jobset == plain


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def shlex_of_bash(line):
    """The words of a line as bash reads it, which writes $'\\n' where shlex cannot."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]
