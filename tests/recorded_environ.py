"""Environments that real schedulers have set, in `tests/recorded`."""

from __future__ import annotations

from conftest import ROOT

RECORDED = ROOT / "tests/recorded"


def recorded(name):
    """The variables of a recorded file."""
    lines = (RECORDED / f"{name}.env").read_text().splitlines()
    assert lines[0].startswith("# source: ")
    pairs = (line.split("=", 1) for line in lines[1:])
    return {name: value.replace("\\n", "\n") for name, value in pairs}


def changed(name, **changes):
    """Recorded variables with some changed, or left out where the change is None."""
    env = {**recorded(name), **changes}
    return {name: value for name, value in env.items() if value is not None}
