"""scripts/tpu_pod.sh, with a stand-in for gcloud."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from script_runs import HOSTILE, MLP, TPU_POD, only, shlex_of_bash, wait_for

TPU_VM = ["compute", "tpus", "tpu-vm"]
ZONE = "--zone=us-west4-a"


def test_tpu_create_and_delete(run_script):
    run_script.stand_in("gcloud", 'record "$@"')
    assert run_script(TPU_POD, "create", "pod", ZONE).returncode == 0
    options = ["--accelerator-type=v6e-8", "--version=v2-alpha-tpuv6e", "--spot", "--project=p"]
    assert run_script(TPU_POD, "create", "pod", ZONE, *options).returncode == 0
    assert run_script(TPU_POD, "delete", "pod", ZONE, stdin="").returncode == 2
    assert run_script(TPU_POD, "delete", "pod", ZONE, stdin="n\n").returncode == 2
    assert run_script(TPU_POD, "delete", "pod", ZONE, stdin="y\n").returncode == 0
    assert run_script(TPU_POD, "delete", "pod", ZONE, "--yes", "--project=p").returncode == 0
    default = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
    assert run_script.calls("gcloud") == [
        [*TPU_VM, "create", "pod", ZONE, *default],
        [*TPU_VM, "create", "pod", ZONE, "--project=p", *options[:3]],
        [*TPU_VM, "delete", "pod", ZONE, "--quiet"],
        [*TPU_VM, "delete", "pod", ZONE, "--project=p", "--quiet"],
    ]


def test_tpu_run_copies_installs_and_starts(run_script, tmp_path):
    """A gcloud that runs, in a folder of this machine, the commands for each host."""
    host = tmp_path / "host"
    (host / "podlift-venv/bin").mkdir(parents=True)
    run_script.stand_in(
        "gcloud",
        f'record "$@"; cd {host}\ncase $4 in scp) cp "$5" podlift.tar.gz ;;\n'
        'ssh) for a in "$@"; do [[ $a != --command=* ]] || exec bash -c "${a#*=}"; done ;; esac',
    )
    run_script.stand_in("python3", f'[[ $1 == -c ]] && exec {sys.executable} "$@"; record "$@"')
    python = run_script.stand_in(
        "host-python",
        f'pwd >{host}/cwd; record "$@"; echo trained\n'
        f"for i in {{1..200}}; do [[ ! -e {host}/end ]] || exit 42; sleep 0.1; done",
    )
    (host / "podlift-venv/bin/python").symlink_to(python)
    workdir = "--workdir=gs://bucket/run"
    done = run_script(TPU_POD, "run", "pod", ZONE, workdir, MLP, HOSTILE)
    assert done.returncode == 0, done
    # The script returns while training runs, although ssh waits for open output.
    assert not (host / "podlift.exit").exists()
    (host / "end").touch()
    wait_for((host / "podlift.exit").exists)
    wait_for((host / "podlift.exit").read_text)
    assert only(run_script.calls("host-python")) == ["-m", "launcher", workdir, MLP, HOSTILE]
    assert (host / "cwd").read_text().strip() == str(host / "podlift")
    assert (host / "podlift/launcher/__main__.py").exists()
    scp, install, start = run_script.calls("gcloud")
    assert scp[:4] + scp[5:] == [*TPU_VM, "scp", "pod:podlift.tar.gz", ZONE, "--worker=all"]
    for call in (install, start):
        assert call[:-1] == [*TPU_VM, "ssh", "pod", ZONE, "--worker=all"]
        assert call[-1].startswith("--command=")
    assert only(run_script.calls("python3"))[:4] == ["-m", "uv", "pip", "install"]
    logs = run_script(TPU_POD, "logs", "pod", ZONE, "--worker=3")
    assert logs.stdout.splitlines() == ["trained", "exit code: 42"]
    assert "--worker=3" in run_script.calls("gcloud")[-1]


def test_tpu_run_refuses_while_another_is_active_and_stop_ends_that_one(run_script, tmp_path):
    host = tmp_path / "host"
    host.mkdir()
    run_script.stand_in(
        "gcloud",
        f'cd {host}\n[[ $4 == scp ]] || for a in "$@"; do\n'
        '[[ $a != --command=* ]] || exec bash -c "${a#*=}"; done',
    )
    with subprocess.Popen(["sleep", "60"]) as active:
        (host / "podlift.pid").write_text(f"{active.pid}\n")
        done = run_script(TPU_POD, "run", "pod", ZONE, "--workdir=gs://b/r", MLP)
        assert done.returncode == 2
        assert "a run is active on this host" in done.stderr
        assert run_script(TPU_POD, "stop", "pod", ZONE).returncode == 0
        assert active.wait(10) == -signal.SIGTERM


def test_tpu_dry_run(run_script):
    run_script.stand_in("gcloud", 'record "$@"')
    done = run_script(TPU_POD, "run", "pod", ZONE, "--workdir=gs://b/r", MLP, HOSTILE, "--dry-run")
    archive, scp, install, start = done.stdout.splitlines()
    assert "archive" in archive
    assert shlex_of_bash(scp)[:5] == ["gcloud", *TPU_VM, "scp"]
    assert "tar -xzf" in install
    assert shlex_of_bash(start)[-1].startswith("--command=cd podlift\nexec </dev/null")
    for action in ("create", "logs", "stop", "delete"):
        assert run_script(TPU_POD, action, "pod", ZONE, "--dry-run").stdout.startswith(
            "gcloud compute"
        )
    assert run_script.calls("gcloud") == []


def test_the_real_gcloud_has_these_flags(run_script, tmp_path):
    real = shutil.which("gcloud")
    if real is None:
        pytest.skip("there is no gcloud")
    run_script.stand_in("gcloud", 'record "$@"')
    run_script(TPU_POD, "create", "pod", ZONE, "--spot")
    run_script(TPU_POD, "logs", "pod", ZONE)
    run_script(TPU_POD, "delete", "pod", ZONE, "--yes")
    run_script(TPU_POD, "run", "pod", ZONE, MLP, "--workdir=gs://b/r", "--dry-run")
    wanted = {"scp": {"--zone", "--worker"}}
    for call in run_script.calls("gcloud"):
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
