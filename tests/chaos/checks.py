"""What must hold after a round; each check returns its problems, one line each."""

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
    """The results of a run without disturbances.

    Attributes:
        state: the last state, by the names of its leaves.
        best_state: the best state.
        best_steps: the steps in `best/`.
        train_rows: training rows of `metrics.jsonl`, without what depends on speed.
        eval_rows: the other rows.
    """

    state: Mapping[str, np.ndarray]
    best_state: Mapping[str, np.ndarray]
    best_steps: list[int]
    train_rows: list[Row]
    eval_rows: list[Row]


def read(workdir: Path) -> Reference:
    """Reads the results of a finished run."""
    train_rows, eval_rows = rows_of(workdir / "metrics.jsonl")
    return Reference(
        state=name_leaves(trainer.load(workdir)),
        best_state=name_leaves(trainer.load(workdir, best=True)),
        best_steps=layout.steps_in(workdir / layout.BEST),
        train_rows=train_rows,
        eval_rows=eval_rows,
    )


def rows_of(metrics: Path) -> tuple[list[Row], list[Row]]:
    """The training rows and all others, without what depends on speed."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in layout.SPEED_TAGS} for row in rows]
    return (
        [row for row in rows if "train/loss" in row],
        [row for row in rows if "train/loss" not in row],
    )


def results(workdir: Path, reference: Reference) -> list[str]:
    """The results equal those of the reference, bit for bit."""
    try:
        found = read(workdir)
    except Exception as error:  # of any type: this is what is wrong
        return [f"the results cannot be read: {type(error).__name__}: {error}"]
    problems = _states(found.state, reference.state, "the last state")
    if found.best_steps != reference.best_steps:
        problems.append(f"best/ holds {found.best_steps} in place of {reference.best_steps}")
    else:
        problems += _states(found.best_state, reference.best_state, "the best state")
    problems += _rows(found.train_rows, reference.train_rows, "training row")
    return problems + _rows(found.eval_rows, reference.eval_rows, "evaluation row")


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
    """The folder holds only files that belong there, and not too many steps."""
    problems = []
    unexpected: Counter[str] = Counter()
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_dir():
            if any(path.iterdir()):
                continue
            name += "/-"  # an empty folder is judged like a file in it
        if not layout.is_allowed(name, damaged=bool(damages), set_back=set_back):
            unexpected["/".join(Path(name).parts[:2])] += 1
    for name, count in unexpected.items():
        problems.append(f"not explained: {name}" + (f" ({count} files)" if count > 1 else ""))
    steps = layout.steps_in(workdir / layout.CHECKPOINTS)
    # A damaged step that no restore has read may still be there.
    if len(steps) > layout.KEEP + len(damages):
        problems.append(f"{len(steps)} checkpoints are kept: {steps}")
    return problems


def memory(workdir: Path) -> list[str]:
    """No in-memory checkpoint of the run is left."""
    return [f"left in memory: {folder}" for folder in layout.fast_folders(workdir)]


def damage_was_found(
    workdir: Path, damage: Damage, starts: list[Start], *, in_memory: bool
) -> list[str]:
    """Damage was reported, and the damaged step was kept and not restored.

    Args:
        workdir: of the run.
        damage: to one of its checkpoints.
        starts: all of them, in order.
        in_memory: whether the run saved in-memory checkpoints.
    """
    if not damage.harms:
        return []
    later = starts[damage.start :]
    step = restored(later[0]) if later else None
    if step is None:
        return [f"{damage.what}: no log says which step was restored"]
    if step > damage.step:
        return []  # not read: there was a newer checkpoint, perhaps in memory
    problems = []
    if step == damage.step and not in_memory:
        problems.append(f"{damage.what}: step {step} was restored all the same")
    if not any(
        layout.damage_is_reported(start.stderr.read_text(errors="replace"), damage.step)
        for start in later
    ):
        problems.append(f"{damage.what}: no line of stderr says so")
    return problems + kept(workdir, damage)


def read_errors_were_told(starts: list[Start]) -> list[str]:
    """Some start said that the disk did not answer, and went on when it did."""
    said = [start.stderr.read_text(errors="replace") for start in starts]
    if any("cannot be read: Input/output error" in text for text in said):
        return []
    return ["no line of stderr says that the disk could not be read"]


def kept(workdir: Path, damage: Damage, *, where_it_was: bool = False) -> list[str]:
    """A damaged step was quarantined unchanged.

    Args:
        workdir: of the run.
        damage: to one of its checkpoints.
        where_it_was: whether it may also have stayed in its place.
    """
    quarantined = list((workdir / layout.QUARANTINE).glob(f"{damage.step}-*"))
    if where_it_was:
        quarantined.append(workdir / layout.CHECKPOINTS / str(damage.step))
    # A note with the reason may have been added.
    if not any(f.is_dir() and damage.files.items() <= digests(f).items() for f in quarantined):
        return [f"{damage.what}: it is not kept as it was in {layout.QUARANTINE}/{damage.step}-*"]
    return []
