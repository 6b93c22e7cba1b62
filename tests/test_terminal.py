"""A live bar on a terminal, and nothing of it elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

from conftest import ROOT

COMMAND = [sys.executable, "-m", "launcher", "--config=configs/mlp.py", "--config.num_epochs=300"]


def test_the_bar_is_for_terminals_only(tmp_path):
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={tmp_path}/a"], stdout=slave, stderr=slave, env=environ, cwd=ROOT
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the terminal closes with the process
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait() == 0, shown.decode()
    assert "━".encode() in shown
    assert b"/300" in shown
    assert b"Loss for epoch 300" in shown

    piped = subprocess.run(
        [*COMMAND, f"--workdir={tmp_path}/b"],
        capture_output=True,
        env=environ,
        cwd=ROOT,
        check=True,
    )
    assert "━".encode() not in piped.stdout
    assert b"\x1b" not in piped.stdout + (tmp_path / "a/logs/attempt-1/rank-0.log").read_bytes()
