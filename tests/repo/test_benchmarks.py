"""Benchmarks start and their jobs are valid Python; no test depends on what they measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
COMMANDS = [path for path in FILES if "= parser_of(" in path.read_text()]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_benchmark_says_how_it_is_used(path):
    done = subprocess.run(
        [sys.executable, path, "--help"],
        check=False,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert "--out" in done.stdout


def test_files_that_run_in_other_environments_are_valid_python():
    for path in FILES:
        compile(path.read_text(), path, "exec")


def test_the_docs_quote_the_recorded_ratios():
    text = (ROOT / "docs/benchmarks.md").read_text()
    results = ROOT / "benchmarks/results"
    steps = json.loads((results / "peers.json").read_text())["steps"]
    sums = json.loads((results / "exchange.json").read_text())["rows"]
    ratios = [f"{row['it / podlift']:.2f}" for row in steps if "podlift" in row]
    ratios += [f"{row['gloo / exchange']:.2f}" for row in sums]
    assert len(ratios) == 14
    assert [ratio for ratio in ratios if ratio not in text] == []
