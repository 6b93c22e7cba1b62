"""What has to hold when a round is over; each check returns what is wrong, one line a problem."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layout
import numpy as np
from damage import Damage, digests
from running import Start, restored

import trainer
from trainer.state.leaves import name_leaves

Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """What a run ends with that nobody disturbs.

    Attributes:
        state: the last one, by the names of its leaves.
        best_state: the best one.
        best_steps: what `best/` holds.
        train_rows: of `metrics.jsonl`, without what depends on speed.
        eval_rows: the others.
    """

    state: Mapping[str, np.ndarray]
    best_state: Mapping[str, np.ndarray]
    best_steps: list[int]
    train_rows: list[Row]
    eval_rows: list[Row]


def read(workdir: Path) -> Reference:
    """What a finished run has ended with."""
    train_rows, eval_rows = rows_of(workdir / "metrics.jsonl")
    return Reference(
        state=name_leaves(trainer.load(workdir)),
        best_state=name_leaves(trainer.load(workdir, best=True)),
        best_steps=layout.steps_in(workdir / layout.BEST),
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def rows_of(metrics: Path) -> tuple[list[Row], list[Row]]:
    """The rows of training, and all others, without what depends on speed."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in layout.SPEED_TAGS} for row in rows]
    return (
        [row for row in rows if "train/loss" in row],
        [row for row in rows if "train/loss" not in row],
    )


def results(workdir: Path, reference: Reference) -> list[str]:
    """The numbers are those of the reference, to the last bit."""
    try:
        found = read(workdir)
    except Exception as error:  # whatever it is, it is what is wrong
        return [f"the results cannot be read: {type(error).__name__}: {error}"]
    problems = _states(found.state, reference.state, "the last state")
    if found.best_steps != reference.best_steps:
        problems.append(f"best/ holds {found.best_steps} in place of {reference.best_steps}")
    else:
        problems += _states(found.best_state, reference.best_state, "the best state")
    problems += _rows(found.train_rows, reference.train_rows, "row of training")
    return problems + _rows(found.eval_rows, reference.eval_rows, "row of evaluation")


def _states(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str
) -> list[str]:
    if found.keys() != expected.keys():
        return [f"{what} has other leaves: {sorted(found.keys() ^ expected.keys())}"]
    differing = [
        name
        for name in expected
        for a, b in [(np.asarray(found[name]), np.asarray(expected[name]))]
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes()
    ]
    return [f"{what} differs in {', '.join(differing)}"] if differing else []


def _rows(found: list[Row], expected: list[Row], what: str) -> list[str]:
    if found == expected:
        return []
    steps, expected_steps = ([row["step"] for row in rows] for rows in (found, expected))
    problems = [
        f"{what} {verb}: step {step}"
        for step in sorted({*steps, *expected_steps})
        for verb, is_so in (
            ("missing", steps.count(step) < expected_steps.count(step)),
            ("there too often", steps.count(step) > expected_steps.count(step)),
        )
        if is_so
    ]
    if problems:
        return problems
    if steps != expected_steps:
        return [f"{what}: steps in another order: {steps}"]
    return [
        f"{what} differs: {a} in place of {b}"
        for a, b in zip(found, expected, strict=True)
        if a != b
    ]


def files(workdir: Path, damages: list[Damage], *, set_back: bool) -> list[str]:
    """Every file in the folder is one that belongs there, and no step too many is kept."""
    problems = []
    strange: Counter[str] = Counter()
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_dir():
            if any(path.iterdir()):
                continue
            name += "/-"  # an empty folder is judged as a file in it would be
        if not layout.is_allowed(name, damaged=bool(damages), set_back=set_back):
            strange["/".join(Path(name).parts[:2])] += 1
    for name, count in strange.items():
        problems.append(f"not explained: {name}" + (f" ({count} files)" if count > 1 else ""))
    steps = layout.steps_in(workdir / layout.CHECKPOINTS)
    # One that nobody had to look at may still be there.
    if len(steps) > layout.KEEP + len(damages):
        problems.append(f"{len(steps)} checkpoints are kept: {steps}")
    return problems


def memory(workdir: Path) -> list[str]:
    """Nothing of the run is left in the machine's memory."""
    return [f"left in memory: {folder}" for folder in layout.fast_folders(workdir)]


def damage_was_found(
    workdir: Path, damage: Damage, starts: list[Start], *, fast_tier: bool
) -> list[str]:
    """What was damaged was told of, kept, and not used.

    Args:
        workdir: of the run.
        damage: done to it.
        starts: all, in order.
        fast_tier: whether the run had one.
    """
    if not damage.harms:
        return []
    later = starts[damage.start :]
    step = restored(later[0]) if later else None
    if step is None:
        return [f"{damage.what}: nothing tells which step was restored"]
    if step > damage.step:
        return []  # nobody had to look at it: memory, or a checkpoint after it, had something newer
    problems = []
    if step == damage.step and not fast_tier:
        problems.append(f"{damage.what}: step {step} was restored all the same")
    if not any(
        layout.damage_is_told(start.stderr.read_text(errors="replace"), damage.step)
        for start in later
    ):
        problems.append(f"{damage.what}: no line of stderr says so")
    return problems + kept(workdir, damage)


def kept(workdir: Path, damage: Damage, *, where_it_was: bool = False) -> list[str]:
    """A damaged step was moved aside as it was.

    Args:
        workdir: of the run.
        damage: done to it.
        where_it_was: whether it may also have stayed in its place.
    """
    aside = list((workdir / layout.QUARANTINE).glob(f"{damage.step}-*"))
    if where_it_was:
        aside.append(workdir / layout.CHECKPOINTS / str(damage.step))
    # A note of why it was moved may have come to it.
    if not any(f.is_dir() and damage.files.items() <= digests(f).items() for f in aside):
        return [f"{damage.what}: it is not kept as it was in {layout.QUARANTINE}/{damage.step}-*"]
    return []
