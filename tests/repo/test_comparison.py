"""The pages quote the seconds of the recorded benchmark."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from conftest import ROOT

ROWS = json.loads((ROOT / "benchmarks/results/recovery.json").read_text())["rows"]
KINDS = {"kill": "killed (-9)", "raise": "raises", "stall": "stalls", "term": "SIGTERM"}


def medians(who, kind):
    """(noticed, resumed), as the pages write them; nothing where no run resumed."""
    rows = [row for row in ROWS if (row["who"], row["kind"]) == (who, kind) and "resumed" in row]
    for name in ("noticed", "resumed") if rows else ():
        seconds = statistics.median(row[name] for row in rows)
        yield f"{seconds:.0f}" if seconds > 60 else f"{seconds:.1f}"


@pytest.mark.parametrize("page", ["docs/comparison.md", "docs/reliability.md"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_quotes_the_recorded_seconds(page, kind):
    cells = row_of(page, kind)
    for who, cell in zip(("podlift", "torchrun", "raw JAX"), cells, strict=True):
        expected = list(medians(who, kind))
        if expected:
            assert re.findall(r"([\d.]+) s\b", cell) == expected, cell


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_quotes_the_recorded_seconds(kind):
    """It omits the time to notice a SIGTERM."""
    for who, cell in zip(("podlift", "torchrun"), row_of("README.md", kind)[:2], strict=True):
        expected = list(medians(who, kind))
        found = re.findall(r"([\d.]+) s\b", cell)
        assert found == (expected[1:] if kind == "term" else expected), cell


def row_of(page, kind):
    """The cells of the last row for this kind, without the first."""
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
    [*_, row] = [row for row in rows if KINDS[kind] in row.split("|")[1] and " s" in row]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]
