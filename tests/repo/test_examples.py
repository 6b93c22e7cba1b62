"""The examples run as the README shows them."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "bring_your_own"


def test_a_users_own_package_trains(launch, tmp_path):
    code, out, err = launch(
        "--config=config.py", "--fake_devices=4", f"--workdir={tmp_path}/run", cwd=EXAMPLE
    )
    assert code == 0, err
    assert float(out.split("best eval/accuracy ")[1].split()[0]) > 0.95


def test_a_script_trains_without_a_launcher(tmp_path):
    done = subprocess.run(
        [sys.executable, "notebook.py", tmp_path / "run"],
        cwd=EXAMPLE,
        check=False,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "held-out accuracy 0.9" in done.stdout or "held-out accuracy 1.0" in done.stdout
    assert "scores" in done.stdout
