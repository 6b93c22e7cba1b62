"""scripts/fake_devices.sh."""

from __future__ import annotations

import shlex
import shutil

from script_runs import FAKE_DEVICES, MLP, SCRIPTS


def test_fake_devices_keeps_other_flags(run_script, tmp_path):
    """The script beside a train.sh that prints its environment and arguments."""
    folder = tmp_path / "it's here" / "scripts"
    folder.mkdir(parents=True)
    shutil.copy(SCRIPTS / FAKE_DEVICES, folder)
    (folder / "train.sh").write_text('#!/bin/sh\nprintf "%s\\n" "$XLA_FLAGS" "$JAX_PLATFORMS" "$@"')
    (folder / "train.sh").chmod(0o755)
    flags = "--xla_a=1  --xla_force_host_platform_device_count=2 --xla_b=*"
    done = run_script(folder / FAKE_DEVICES, 8, MLP, "--config.x=a b", XLA_FLAGS=flags)
    assert done.returncode == 0, done
    count = "--xla_force_host_platform_device_count=8"
    assert done.stdout.splitlines() == [
        f"--xla_a=1 --xla_b=* {count}",
        "cpu",
        MLP,
        "--config.x=a b",
    ]
    assert run_script(folder / FAKE_DEVICES, 8, MLP).stdout.splitlines()[0] == count


def test_fake_devices_beats_jaxs_own_variable(run_script, tmp_path):
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPTS / FAKE_DEVICES, tmp_path / "scripts")
    train = tmp_path / "scripts" / "train.sh"
    train.write_text('#!/bin/sh\necho "${JAX_NUM_CPU_DEVICES-unset}"')
    train.chmod(0o755)
    done = run_script(train.with_name("fake_devices.sh"), 8, MLP, JAX_NUM_CPU_DEVICES="2")
    assert (done.stdout, done.stderr) == (
        "unset\n",
        "warning: JAX_NUM_CPU_DEVICES=2 is ignored: 8 devices\n",
    )


def test_fake_devices_dry_run(run_script):
    done = run_script(FAKE_DEVICES, 4, MLP, "--dry-run", XLA_FLAGS="--xla_a=1")
    flags, platform, script, config = shlex.split(done.stdout)
    assert flags == "XLA_FLAGS=--xla_a=1 --xla_force_host_platform_device_count=4"
    assert (platform, script) == ("JAX_PLATFORMS=cpu", str(SCRIPTS / "train.sh"))
    assert config == MLP
