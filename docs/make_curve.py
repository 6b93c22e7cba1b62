"""Draws docs/curve.svg: `python docs/make_curve.py LABEL=WORKDIR [LABEL=WORKDIR ...]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "podlift"
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
styles = iter([{"color": "#1f6feb", "lw": 3.5, "alpha": 0.5}, {"color": "#b42318", "lw": 1.2}])
for argument in sys.argv[1:]:
    label, _, workdir = argument.partition("=")
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    style = next(styles)
    for axes, tag in ((left, "train/loss"), (right, "eval/accuracy")):
        points = [(row["step"], row[tag]) for row in rows if tag in row]
        axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set_title(tag, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.25)
left.legend(frameon=False, fontsize=9)
figure.tight_layout()
figure.savefig(Path(__file__).parent / "curve.svg", metadata={"Date": None})
