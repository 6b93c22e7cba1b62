"""docs/terminal.svg: its command works, and it shows nothing of the machine that made it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET

from conftest import ROOT

PICTURE = ROOT / "docs" / "terminal.svg"
MADE_BY = runpy.run_path(str(ROOT / "docs" / "make_terminal.py"))


def test_the_picture_is_small_and_self_contained():
    text = PICTURE.read_text()
    tree = ET.fromstring(text)
    assert {part.tag.partition("}")[2] for part in tree.iter()} == {
        *("svg", "title", "style", "clipPath", "path", "rect", "g", "text")
    }
    assert re.findall(r"\w+://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert len(text) < 50_000


def test_the_picture_shows_a_restart_and_no_path_of_this_machine():
    shown = "\n".join(part.text for part in ET.parse(PICTURE).iter() if part.text)
    events = [
        MADE_BY["COMMAND"],
        "error: rank 1 was killed by SIGKILL",
        "restart 1 of 1",
        "restored step ",
        "finished: 440 steps",
    ]
    assert sorted(events, key=shown.index) == events
    # Epochs repeated after the restart have the same loss, to the last digit.
    epochs = re.findall(r"Loss for epoch (\d+): (\S+)", shown)
    assert len(epochs) > len(dict(epochs)) == len(set(epochs)) == 20
    paths = re.findall(r"(?<![\w.])/\w+/\S+", shown)
    assert paths
    assert [path for path in paths if not path.startswith(MADE_BY["HOME"])] == []


def test_the_command_starts_two_ranks():
    command = [sys.executable, *shlex.split(MADE_BY["COMMAND"])[1:], "--dry_run"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("XLA_FLAGS", None)
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout
