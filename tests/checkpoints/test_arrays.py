"""Arrays in Orbax's format: what its threads may print."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

READ_DAMAGED = """
import pathlib, sys, time
import numpy as np
from trainer.checkpoints import arrays
from trainer.checkpoints.manifest import Leaf

folder = pathlib.Path(sys.argv[1])
saved = {f"leaf{i}": np.random.default_rng(i).random(1000) for i in range(40)}
leaves = {name: Leaf(array.shape, str(array.dtype), 0) for name, array in saved.items()}
arrays.write(folder, saved)
data = [file for file in (folder / "state").rglob("*") if file.parent.name == "d"]
for file in data:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        arrays.read(folder, leaves)
    except ValueError:
        print("damaged")
    file.write_bytes(whole)
time.sleep(0.5)  # for tensorstore's threads

class Raises:
    def __del__(self):
        raise ValueError("of the user's code")

Raises()
"""


def test_threads_that_still_read_a_damaged_checkpoint_print_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", READ_DAMAGED, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stdout
    assert "Event loop" not in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "of the user's code" in done.stderr
