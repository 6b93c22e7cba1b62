"""`config.init_from`: initialises a new run with the params and model state of another run.

Process 0 reads them, checks every file and leaf, and broadcasts them. The optimizer state, the step
and the random key stay those of the new run.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from etils import epath

from trainer.checkpoints.init_map import Match, match_leaves, split_collection
from trainer.checkpoints.load import Saved, read_saved, refuse_unusable
from trainer.checkpoints.manifest import Leaf
from trainer.config.settings import Settings
from trainer.console import say
from trainer.errors import CheckpointsUnreadable, UserError
from trainer.lift.lift import Lift
from trainer.state.leaves import fill_in, name_leaves
from trainer.state.train_state import TrainState
from trainer.workdir.paths import absolute, exists
from trainer.workdir.patience import patiently

_SHOWN = 8
_PLACES = "name the folder of a run, RUN/best or RUN/checkpoints/120"


def initialise_from(settings: Settings, lift: Lift, state: TrainState) -> TrainState:
    """Replaces leaves of a new state by those of `config.init_from`, and prints which.

    All processes call this at the same point.

    Args:
        settings: the checked config of the new run.
        lift: the lift over the devices.
        state: the initial state, on the devices.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist or is damaged.
        UserError: a leaf has another shape, a rule fits nothing, or no leaf would be loaded.
    """
    saved, listed, place = _read_for_all(str(settings.init_from), lift)
    wanted = name_leaves({"params": state.params, "model_state": state.model_state})
    match = match_leaves(listed, wanted, settings.init_map)
    _check_fit(match, listed, wanted, settings.init_map)
    used = {source: listed[source] for source in match.sources.values()}
    arrays = lift.broadcast_arrays(saved, used, 0)
    loaded = {
        name: arrays[source].astype(wanted[name].dtype) for name, source in match.sources.items()
    }
    _report(place, match, listed, loaded)
    initial = name_leaves(state)
    if state.ema is not None:  # initially it equals the params
        averages = {
            f"ema/{name.removeprefix('params/')}": leaf
            for name, leaf in loaded.items()
            if name.startswith("params/")
        }
        loaded |= {name: leaf.astype(initial[name].dtype) for name, leaf in averages.items()}
    return cast(
        TrainState,
        fill_in(state, {name: lift.put_like(leaf, initial[name]) for name, leaf in loaded.items()}),
    )


def read(place: str) -> Saved:
    """Reads the params and model state of a run's folder, or of one checkpoint in it.

    The params are those that the run evaluates: their average, if it keeps one.

    Raises:
        CheckpointsUnreadable: the checkpoint does not exist or is damaged.
    """
    folder = absolute(place)
    if not patiently(folder, lambda: exists(folder)):
        near = difflib.get_close_matches(folder.name, _names_beside(folder), n=1)
        hint = f"did you mean {folder.parent / near[0]}?" if near else _PLACES
        raise CheckpointsUnreadable(f"{folder} does not exist", hint)
    is_run = any((folder / name).exists() for name in ("config.json", "checkpoints"))
    if not is_run and folder.name.isdigit() and folder.parent.name in ("best", "checkpoints"):
        saved = read_saved(folder.parent.parent, step=int(folder.name))
    elif not is_run and folder.name in ("best", "checkpoints"):
        saved = read_saved(folder.parent, best=folder.name == "best")
    else:
        saved = read_saved(folder)
    averaged = any(name.startswith("ema/") for name in saved.listed)
    source = {"ema" if averaged else "params": "params", "model_state": "model_state"}
    names = {
        name: f"{source[first]}/{rest}"
        for name in saved.listed
        for first, _, rest in [name.partition("/")]
        if first in source
    }
    return replace(
        saved,
        leaves={new: saved.leaves[old] for old, new in names.items()},
        listed={new: saved.listed[old] for old, new in names.items()},
    )


def _names_beside(folder: epath.Path) -> list[str]:
    try:
        return [path.name for path in folder.parent.iterdir()]
    except OSError:
        return []


def _check_fit(
    match: Match, listed: Mapping[str, Leaf], wanted: Mapping[str, Any], rules: Sequence[str]
) -> None:
    """Raises a UserError for other shapes and other kinds of dtype; precisions may differ."""
    others = [
        name for name, source in match.sources.items() if not _fits(listed[source], wanted[name])
    ]
    if others:
        name = others[0]
        source = match.sources[name]
        renamed = f" (from {source})" if source != name else ""
        more = f", and {len(others) - 1} more do not fit" if others[1:] else ""
        there, here = _show(listed[source]), _show(wanted[name])
        inside = [split_collection(name)[1] for name in others]
        parts = dict.fromkeys(f"!{name.rpartition('/')[0] or name}" for name in inside)
        raise UserError(
            f"config.init_from: {name}{renamed} is {there} in the checkpoint and {here} in this "
            f"model{more}",
            f"keep such parts as initialised: --config.init_map='{','.join([*rules, *parts])}'",
        )
    if not match.sources:
        first, ours = (", ".join([*list(names)[:3], "..."]) for names in (listed, wanted))
        raise UserError(
            f"config.init_from: no leaf of the checkpoint fits this model: it has {first}",
            f"this model has {ours}; --config.init_map='old->new' renames parts",
        )


def _fits(there: Any, here: Any) -> bool:
    are_floats = all(jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating) for leaf in (there, here))
    is_same_kind = are_floats or jnp.dtype(there.dtype) == here.dtype
    return tuple(there.shape) == tuple(here.shape) and is_same_kind


def _show(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _read_for_all(
    place: str, lift: Lift
) -> tuple[dict[str, np.ndarray] | None, dict[str, Leaf], str]:
    """The arrays in process 0; in all processes their manifest and the checkpoint's path."""
    saved: Saved | None = None
    found: dict[str, Any] = {}
    if lift.process == 0:
        try:
            saved = read(place)
            refuse_unusable(saved)
            leaves = {name: asdict(leaf) for name, leaf in saved.listed.items()}
            found = {"place": str(saved.place), "leaves": leaves}
        except CheckpointsUnreadable as error:
            found = {"message": error.message, "hint": error.hint or _PLACES}
    found = json.loads(lift.broadcast_text(json.dumps(found)))
    if "message" in found:
        raise CheckpointsUnreadable(
            f"config.init_from={place!r}: {found['message']}", found["hint"]
        )
    listed = {
        name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
        for name, leaf in found["leaves"].items()
    }
    return saved.leaves if saved is not None else None, listed, found["place"]


def _report(
    place: str, match: Match, listed: Mapping[str, Leaf], loaded: Mapping[str, np.ndarray]
) -> None:
    numbers = sum(leaf.size for leaf in loaded.values())
    say(f"init_from {place}: {len(loaded)} leaves loaded ({numbers:,} numbers)")
    cast = [
        f"{name} ({listed[source].dtype} -> {loaded[name].dtype})"
        for name, source in match.sources.items()
        if listed[source].dtype != str(loaded[name].dtype)
    ]
    kept = [f"{name} ({why})" for name, why in match.kept.items()]
    for what, names in (("cast", cast), ("as initialised", kept), ("not used", match.unused)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            say(f"  {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
