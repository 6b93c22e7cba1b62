"""docs/terminal.svg: what it shows can be typed, and where it was made cannot be seen in it."""

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


def test_it_is_a_small_picture_that_needs_nothing_else():
    text = PICTURE.read_text()
    tree = ET.fromstring(text)
    assert {part.tag.partition("}")[2] for part in tree.iter()} == {
        *("svg", "title", "style", "clipPath", "path", "rect", "g", "text")
    }
    assert re.findall(r"\w+://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert len(text) < 50_000


def test_it_tells_the_whole_story_and_nothing_of_this_machine():
    shown = "\n".join(part.text for part in ET.parse(PICTURE).iter() if part.text)
    story = [
        MADE_BY["COMMAND"],
        "error: rank 1 was killed by SIGKILL",
        "restart 1 of 1",
        "restored step ",
        "finished: 440 steps",
    ]
    assert sorted(story, key=shown.index) == story
    # The epochs after the restart are those before it, to the last digit.
    epochs = re.findall(r"Loss for epoch (\d+): (\S+)", shown)
    assert len(epochs) > len(dict(epochs)) == len(set(epochs)) == 20
    paths = re.findall(r"(?<![\w.])/\w+/\S+", shown)
    assert paths
    assert [path for path in paths if not path.startswith(MADE_BY["HOME"])] == []


def test_the_command_starts_what_it_shows():
    command = [sys.executable, *shlex.split(MADE_BY["COMMAND"])[1:], "--dry_run"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    environ.pop("XLA_FLAGS", None)
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout
