"""What is decided before anything starts: processes, devices, environments, limits."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from slurm_environ import SLURM

from launcher.command_line import flags
from launcher.launch.build import make_launch_spec
from launcher.launch.dry_run import describe_launch
from trainer.config.config_json import config_from_json
from trainer.config.keys import flatten
from trainer.errors import UserError

MLP = f"--config={ROOT}/configs/mlp.py"


def spec_of(tmp_path, *arguments, **environ):
    options = flags.parse(["launcher", MLP, f"--workdir={tmp_path}/run", *arguments])
    return make_launch_spec(options, {"HOME": str(tmp_path), **environ})


def test_one_process_runs_in_place_and_more_are_supervised(tmp_path):
    assert not spec_of(tmp_path).supervised
    assert spec_of(tmp_path, "--max_restarts=1").supervised
    assert spec_of(tmp_path, "--hang_timeout_secs=60").supervised
    two = spec_of(tmp_path, "--processes=2", "--fake_devices=2")
    assert two.supervised
    assert [worker.rank for worker in two.workers] == [0, 1]
    for worker in two.workers:
        assert "device_count=2" in worker.environ["XLA_FLAGS"]
        assert worker.environ["JAX_PLATFORMS"] == "cpu"


def test_processes_share_the_gpus(tmp_path):
    shares = spec_of(tmp_path, "--processes=2", CUDA_VISIBLE_DEVICES="4,5,6,7")
    visible = [worker.environ["CUDA_VISIBLE_DEVICES"] for worker in shares.workers]
    assert visible == ["4,5", "6,7"]
    with pytest.raises(UserError, match="--processes=4 cannot share 3 GPUs equally"):
        spec_of(tmp_path, "--processes=4", CUDA_VISIBLE_DEVICES="0,1,2")
    on_cpu = spec_of(tmp_path, "--processes=2", JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="0,1,2")
    assert "CUDA_VISIBLE_DEVICES" not in on_cpu.workers[0].environ


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
SHELL = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}

REFUSED = [
    (["--max_restarts=3"], SLURM, "is for a job on this machine alone"),
    (["--processes=2"], SLURM, "slurm has started 2 processes already"),
    (["--processes=2"], TORCHRUN, "torchrun has started 2 processes already"),
    (["--processes=2"], {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK is not set"),
    ([], {"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK is not set"),
    ([], {**SHELL, "WORLD_SIZE": "2"}, "SLURM has 2 tasks for this job, but srun is missing"),
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
def test_impossible_launches_are_refused(tmp_path, arguments, environ, text):
    with pytest.raises(UserError) as error:
        spec_of(tmp_path, *arguments, **environ)
    assert text in str(error.value)


def test_one_process_of_a_cluster(tmp_path):
    spec = spec_of(tmp_path, "--fake_devices=2", **SLURM)
    assert spec.num_processes == 2
    assert [worker.rank for worker in spec.workers] == [1]
    assert "rank 0 at n1:" in describe_launch(spec, SLURM)
    alone = spec_of(tmp_path, "--cluster=none", **SLURM)
    assert alone.num_processes == 1
    options = flags.parse(["launcher", MLP])
    with pytest.raises(UserError, match="--workdir is missing: slurm has 2 processes"):
        make_launch_spec(options, SLURM)


def test_flags_win_over_variables(tmp_path):
    by_hand = ("--coordinator_address=n1:1", "--num_processes=4", "--process_id=2")
    found = spec_of(tmp_path, *by_hand, **TORCHRUN).placement
    assert (found.cluster, found.host, found.num_processes) == ("by hand", "n1", 4)
    assert spec_of(tmp_path, "--cluster=none", **TORCHRUN).num_processes == 1
    assert spec_of(tmp_path, "--cluster=none", "--processes=2", **TORCHRUN).placement is None
    # --processes means this machine, so the other hosts of a batch job are left idle on purpose.
    assert spec_of(tmp_path, "--processes=2", **SHELL).num_processes == 2


def test_the_workers_get_the_full_config(tmp_path):
    spec = spec_of(tmp_path, "--processes=2")
    again = config_from_json(spec.config)
    assert flatten(again.to_dict()) == flatten(spec.settings.config.to_dict())
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
