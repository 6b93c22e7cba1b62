"""TensorBoard's event files on a disk that is full for a while."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT
from runs import read_tensorboard

# The disk takes nothing while the first events of 600 kB are written, more than a pipe holds.
FULL_FOR_A_WHILE = """
import os, pathlib, sys, time
import numpy as np
from ml_collections import ConfigDict
from trainer.console import open_terminal
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.workdir.workdir import Workdir

open_terminal()
path = pathlib.Path(sys.argv[1])
path.mkdir()

def fill_disk():
    file = writer._writer.file_writer.event_writer._ev_writer._py_recordio_writer._writer
    os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())

writer = TensorBoardWriter(Workdir.check(path, ConfigDict({"seed": 0})), 0)
writer.scalars(1, {"loss": 1.0})
writer.flush()
worker = writer._writer.file_writer.event_writer._worker
fill_disk()
noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
for step in (2, 3, 4):
    writer._writer.add_image("noise", noise, step, dataformats="HWC")  # all before it notices
worker.join(60)
assert not worker.is_alive()
writer.scalars(5, {"loss": 5.0})  # the disk is there again
newest = max(path.glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
while b"loss" not in newest.read_bytes():  # flush does not wait for the thread
    writer.flush()
    time.sleep(0.01)
fill_disk()
writer.scalars(6, {"loss": 6.0})
writer.close()
"""


def test_a_full_disk_is_one_warning_and_later_curves_are_written(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_FOR_A_WHILE, tmp_path / "run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,  # it ends, although nobody has read the queue of the first file
        check=False,
    )
    warning = "warning: no curves for TensorBoard for now: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (0, warning)
    scalars, _ = read_tensorboard(tmp_path / "run")
    assert scalars[("loss", 5)] == 5.0
