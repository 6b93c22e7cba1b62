"""What a saved state and the state that is wanted now have not in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged, Leaf
from trainer.console import warn
from trainer.errors import UserError

_SHOWN = 20


@dataclass(frozen=True)
class Difference:
    """One leaf that is not as it was.

    Attributes:
        name: of the leaf.
        kind: "shape", "dtype", "missing" (was not saved) or "extra" (is no longer there).
        before: what was saved, for a person.
        after: what is wanted.
    """

    name: str
    kind: str
    before: str
    after: str


def compare(saved: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> list[Difference]:
    """The differences between saved leaves and those that are wanted (arrays or their shapes)."""
    found = []
    for name, leaf in wanted.items():
        after = _show(leaf.shape, str(leaf.dtype))
        old = saved.get(name)
        if old is None:
            found.append(Difference(name, "missing", "(not saved)", after))
        elif old.shape != leaf.shape:
            found.append(Difference(name, "shape", _show(old.shape, old.dtype), after))
        elif old.dtype != str(leaf.dtype):
            found.append(Difference(name, "dtype", _show(old.shape, old.dtype), after))
    for name, old in saved.items():
        if name not in wanted:
            before = _show(old.shape, old.dtype)
            found.append(Difference(name, "extra", before, "(not in the model)"))
    return found


def show(differences: Sequence[Difference]) -> str:
    """A table: name, kind, what was saved -> what is wanted."""
    shown = differences[:_SHOWN]
    name_width = max(len(d.name) for d in shown)
    before_width = max(len(d.before) for d in shown)
    lines = [
        f"  {d.name:{name_width}}  {d.kind:7}  {d.before:{before_width}} -> {d.after}"
        for d in shown
    ]
    if len(differences) > _SHOWN:
        lines.append(f"  ... and {len(differences) - _SHOWN} more")
    return "\n".join(lines)


def check_allowed(differences: Sequence[Difference], allow: Sequence[str], where: str) -> None:
    """Refuses differences that were not allowed.

    Args:
        differences: between what was saved and what is wanted.
        allow: kinds of difference, among other things.
        where: the checkpoint.

    Raises:
        UserError: listing them.
    """
    kinds = sorted({d.kind for d in differences} - set(allow))
    together = ",".join([*allow, *kinds])
    refuse(
        [d for d in differences if d.kind in kinds],
        where,
        "go back to the code and config it was saved with, or "
        f"--config.checkpoint.allow={together} goes on all the same: leaves that were not saved "
        "or have another shape start afresh, other dtypes are cast, extra ones are left out",
    )


def refuse(differences: Sequence[Difference], where: str, hint: str) -> None:
    """Raises a UserError that lists the differences, if there are any.

    Args:
        differences: between what was saved and what is wanted.
        where: the checkpoint.
        hint: what to do.
    """
    if differences:
        raise UserError(
            f"the state in {where} is not the one this code and config ask for "
            f"(saved -> wanted):\n{show(differences)}",
            hint,
        )


def adapt(
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Any],
    differences: Sequence[Difference],
    fresh: Callable[[], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """Saved leaves as they are wanted, after the differences were allowed; says what it did.

    Args:
        arrays: what was saved.
        wanted: shapes and dtypes.
        differences: between the two.
        fresh: gives the leaves of a new state.
    """
    kinds = {d.name: d.kind for d in differences}
    begun = fresh() if {"missing", "shape"} & set(kinds.values()) else {}
    adapted = {}
    for name, leaf in wanted.items():
        kind = kinds.get(name)
        if kind is None:
            adapted[name] = arrays[name]
        elif kind == "dtype":
            adapted[name] = arrays[name].astype(jax.numpy.dtype(leaf.dtype))
        else:
            adapted[name] = np.asarray(begun[name])
    if differences:
        warn(f"the state differs from what was saved, as allowed:\n{show(differences)}")
    return adapted


def _show(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def how_leaves_differ(
    folder: CheckpointFolder, wanted: Callable[[], Mapping[str, Any]]
) -> list[Difference]:
    """How the newest saved state differs from what is wanted.

    Nothing is read but a manifest. A courtesy: where it cannot be told, nothing is.

    Args:
        folder: of the checkpoints.
        wanted: gives the shapes and dtypes of the leaves.
    """
    for step in reversed(folder.steps()):
        try:
            found = compare(folder.check(step).leaves, wanted())
        except Damaged:
            continue
        except Exception:  # of the user's model
            return []
        return found
    return []
