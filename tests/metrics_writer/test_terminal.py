"""The live view: on a terminal it leaves every line intact, elsewhere it is absent."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT

COMMAND = [
    sys.executable,
    "-m",
    "launcher",
    "--config=configs/digits.py",
    "--config.num_epochs=15",
    "--config.log_every_steps=50",
    "--config.data.target=noisy:load",
]
NOISY = """
import logging, sys
from trainer.data import digits

class Noisy:
    calls = 0

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples["x"])

    def __getitem__(self, indices):
        Noisy.calls += 1
        if Noisy.calls % 60 == 0:
            print(f"out {Noisy.calls}")
            print(f"err {Noisy.calls}", file=sys.stderr)
            logging.getLogger("podlift").warning("warned %d", Noisy.calls)
        return {name: array[indices] for name, array in self.examples.items()}

def load():
    found = digits.load()
    return {"train": Noisy(found["train"]), "eval": found["eval"]}
"""


def screen_of(shown):
    """What is on an endless terminal in the end, and the rows that were there at some time."""
    rows, row, column, seen = [""], 0, 0, set()
    for text, up, erase, ignored in re.findall(
        r"([\r\n]|[^\x1b\r\n]+)|\x1b\[(\d*)A|(\x1b\[2K)|(\x1b\[(?:\?25[lh]|[\d;]*m))", shown
    ):
        if text == "\n":
            seen.add(rows[row])
            row += 1
            rows += [""] * (row == len(rows))
        elif text == "\r":
            column = 0
        elif text:
            line = rows[row].ljust(column)
            rows[row] = line[:column] + text + line[column + len(text) :]
            seen.add(rows[row])
            column += len(text)
        elif up:
            row -= int(up)
            assert row >= 0
        elif erase:
            rows[row] = ""
        else:
            assert ignored
    return rows, seen


def lines_of(rows):
    """What two runs have in common: all but times and what follows from them."""
    times = re.compile(r"[\d,.]+ (s\b|ms)|\d+:\d\d:\d\d|[\d,]+ examples/s")
    return [times.sub("", row) for row in rows if row and not row.startswith("time: ")]


@pytest.mark.slow
def test_the_live_view_is_for_terminals_only(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    environ = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "100",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }
    environ.pop("XLA_FLAGS")
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
    rows, seen = screen_of(shown.decode())
    live = "\n".join(seen)
    for what in ("━", "/330 ", "eta", "eval/accuracy", "ms/step", "time: ", "checkpoint 330"):
        assert what in live, what
    assert not any("━" in row for row in rows)

    piped = subprocess.run(
        [*COMMAND, f"--workdir={tmp_path}/b"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
        cwd=ROOT,
        check=True,
        text=True,
    )
    assert "━" not in piped.stdout
    log = (tmp_path / "a/logs/attempt-1/rank-0.log").read_text()
    assert "\x1b" not in piped.stdout + log
    plain = piped.stdout.replace(f"{tmp_path}/b", f"{tmp_path}/a").splitlines()
    assert lines_of(rows) == lines_of(plain)
