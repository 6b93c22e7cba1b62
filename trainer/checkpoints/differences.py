"""Differences between a saved state and the expected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.manifest import Damaged, Leaf
from trainer.console import say, warn
from trainer.data.fingerprint import describe_changes
from trainer.errors import UserError
from trainer.state.leaves import is_narrow_float

_SHOWN = 20

# An average that an earlier podlift kept in less than 32 bits. Its cast to float32 is exact, so
# this kind needs no permission.
WIDER = "wider"
_AVERAGES = ("ema/", "opt_state/")


@dataclass(frozen=True)
class Difference:
    """A leaf that differs.

    Attributes:
        name: the name of the leaf.
        kind: "shape", "dtype", "missing" (not saved), "extra" (not in the model) or `WIDER`.
        before: what was saved, for a message.
        after: what is expected, for a message.
    """

    name: str
    kind: str
    before: str
    after: str


def compare(saved: Mapping[str, Leaf], expected: Mapping[str, Any]) -> list[Difference]:
    """The differences between saved leaves and the expected ones.

    Args:
        saved: the leaves in a manifest, by name.
        expected: arrays, or their shapes and dtypes, by name.
    """
    found = []
    for name, leaf in expected.items():
        after = _show(leaf.shape, str(leaf.dtype))
        old = saved.get(name)
        if old is None:
            found.append(Difference(name, "missing", "(not saved)", after))
        elif old.shape != leaf.shape:
            found.append(Difference(name, "shape", _show(old.shape, old.dtype), after))
        elif old.dtype != str(leaf.dtype):
            kind = WIDER if _is_wider(name, old.dtype, str(leaf.dtype)) else "dtype"
            found.append(Difference(name, kind, _show(old.shape, old.dtype), after))
    for name, old in saved.items():
        if name not in expected:
            before = _show(old.shape, old.dtype)
            found.append(Difference(name, "extra", before, "(not in the model)"))
    return found


def show(differences: Sequence[Difference]) -> str:
    """A table with the columns name, kind, and saved -> expected."""
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
    """Raises unless all differences are of permitted kinds.

    Args:
        differences: between the saved state and the expected one.
        allow: the permitted kinds, among other entries of `config.checkpoint.allow`.
        where: the checkpoint.

    Raises:
        UserError: lists the differences that are not permitted.
    """
    kinds = sorted({d.kind for d in differences} - {*allow, WIDER})
    together = ",".join([*allow, *kinds])
    refuse(
        [d for d in differences if d.kind in kinds],
        where,
        "use the code and config it was saved with, or pass "
        f"--config.checkpoint.allow={together} to resume anyway: leaves that were not saved or "
        "have another shape are initialised, other dtypes are cast, extra leaves are dropped",
    )


def check_data(
    saved: Mapping[str, Any] | None, now: Mapping[str, Any], allow: Sequence[str], where: str
) -> str:
    """Raises unless the data are those that a state was trained on, or may differ.

    Args:
        saved: the fingerprints in the checkpoint; None if an earlier podlift wrote it.
        now: the fingerprints of the data of this start, by the name of the source; empty: unknown.
        allow: the entries of `config.checkpoint.allow`.
        where: the checkpoint.

    Returns:
        How they differ, as `allow` permits; empty if they do not.

    Raises:
        UserError: says how they differ.
    """
    what = describe_changes(saved, now) if saved and now else ""
    if what and "data" not in allow:
        together = ",".join([*allow, "data"])
        raise UserError(
            f"the data are not those of the state in {where}: {what}",
            "bring the data back (an unsorted list of files changes its order between starts, and "
            "a set too without PYTHONHASHSEED=0), name another --workdir, or pass "
            f"--config.checkpoint.allow={together} to resume anyway: epochs are counted in the new "
            "data, and a best state that other held-out examples chose is put aside",
        )
    return what


def refuse(differences: Sequence[Difference], where: str, hint: str) -> None:
    """Raises a UserError that lists the differences, if there are any but `WIDER`.

    Args:
        differences: between the saved state and the expected one.
        where: the checkpoint.
        hint: what to do.
    """
    if any(d.kind != WIDER for d in differences):
        raise UserError(
            f"the state in {where} does not match this code and config "
            f"(saved -> expected):\n{show(differences)}",
            hint,
        )


def adapt(
    arrays: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    differences: Sequence[Difference],
    fresh: Callable[[], Mapping[str, Any]],
) -> dict[str, np.ndarray]:
    """Turns saved leaves into the expected ones, with a warning that lists the differences.

    Args:
        arrays: the saved leaves, by name.
        expected: the expected shapes and dtypes, by name.
        differences: between the two; all of them are permitted.
        fresh: returns the leaves of a new state.
    """
    kinds = {d.name: d.kind for d in differences}
    initialised = fresh() if {"missing", "shape"} & set(kinds.values()) else {}
    adapted = {}
    for name, leaf in expected.items():
        kind = kinds.get(name)
        if kind is None:
            adapted[name] = arrays[name]
        elif kind in ("dtype", WIDER):
            adapted[name] = arrays[name].astype(jax.numpy.dtype(leaf.dtype))
        else:
            adapted[name] = np.asarray(initialised[name])
    wider = [d.name for d in differences if d.kind == WIDER]
    others = [d for d in differences if d.kind != WIDER]
    if wider:
        say(f"{len(wider)} averages in 16 bits are float32 from now on, such as {wider[0]}")
    if others:
        table = show(others)
        warn(f"the state differs from the saved one, as config.checkpoint.allow permits:\n{table}")
    return adapted


def _is_wider(name: str, before: str, after: str) -> bool:
    is_average = name.startswith(_AVERAGES) and after == "float32"
    return is_average and is_narrow_float(jax.numpy.dtype(before))


def _show(shape: Sequence[int], dtype: str) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def how_leaves_differ(
    folder: CheckpointFolder, expected: Callable[[], Mapping[str, Any]]
) -> list[Difference]:
    """How the newest saved state differs from the expected one; empty if that is unknown.

    Reads manifests only.

    Args:
        folder: the folder of checkpoints.
        expected: returns the shapes and dtypes of the leaves, by name.
    """
    for step in reversed(folder.steps()):
        try:
            found = compare(folder.check(step).leaves, expected())
        except Damaged:
            continue
        except Exception:  # the user's model may raise anything
            return []
        return [d for d in found if d.kind != WIDER]
    return []
