"""A fresh run that begins with the params and the model state of another run.

Process 0 reads them, every file and leaf checked, and gives them to the others. The optimizer's
state, the step and the random numbers are the new run's own.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from etils import epath

from trainer.checkpoints.load import Saved, read_saved
from trainer.checkpoints.manifest import Leaf
from trainer.config.settings import Settings
from trainer.console import say
from trainer.errors import CheckpointsUnreadable, UserError
from trainer.lift.lift import Lift
from trainer.state.leaves import fill_in, name_leaves
from trainer.state.subtrees import hint_for, is_within
from trainer.state.train_state import TrainState
from trainer.workdir.paths import absolute

_SHOWN = 8
_PLACES = "name the folder of a run, RUN/best or RUN/checkpoints/120"


@dataclass(frozen=True)
class Match:
    """Which leaf of the source goes where. All names are whole, as "params/Dense_0/kernel".

    Attributes:
        sources: the leaf of the source, by the leaf of the new model that it becomes.
        kept: leaves of the new model that stay as they were initialised, and why.
        unused: leaves of the source that have no place.
    """

    sources: Mapping[str, str]
    kept: Mapping[str, str]
    unused: tuple[str, ...]


def initialise_from(settings: Settings, lift: Lift, state: TrainState) -> TrainState:
    """A new state with the leaves that `config.init_from` has for it, and says which these are.

    All processes call it at the same point.

    Args:
        settings: of the new run.
        lift: which knows the processes.
        state: as initialised, on the devices.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or it is not what was saved.
        UserError: a leaf has another shape, a rule has nothing to do, or nothing would be loaded.
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
    _tell(place, match, listed, loaded)
    if state.ema is not None:  # as initialised it equals the params
        loaded |= {
            f"ema/{name.removeprefix('params/')}": leaf
            for name, leaf in loaded.items()
            if name.startswith("params/")
        }
    there = name_leaves(state)
    return cast(
        TrainState,
        fill_in(state, {name: lift.put_like(leaf, there[name]) for name, leaf in loaded.items()}),
    )


def read(place: str) -> Saved:
    """The state that a folder stands for: that of a run, or a checkpoint in it.

    Its params are those that its run evaluates: their average, where it has one.

    Raises:
        CheckpointsUnreadable: there is no such checkpoint, or it is not what was saved.
    """
    folder = absolute(place)
    if not folder.exists():
        near = difflib.get_close_matches(folder.name, _names_beside(folder), n=1)
        hint = f"did you mean {folder.parent / near[0]}?" if near else _PLACES
        raise CheckpointsUnreadable(f"there is no {folder}", hint)
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


def match_leaves(
    source: Sequence[str] | Mapping[str, Any],
    wanted: Sequence[str] | Mapping[str, Any],
    rules: Sequence[str],
) -> Match:
    """Finds the place of each leaf, by its name.

    A rule is about the names inside a collection, so `old->new` renames the params and the
    statistics of a module alike; of several that fit a leaf, the first counts.

    Args:
        source: names of leaves, as "params/Dense_0/kernel".
        wanted: the same of the new model.
        rules: `old->new` or `!part`.

    Raises:
        UserError: a rule is none or has nothing to do, or two leaves would become one.
    """
    renames, skips = _parse(rules)
    inside = [_split(name)[1] for name in source]
    for old, _ in renames:
        _check_rule(old, inside, "what config.init_from holds")
    for part in skips:
        _check_rule(part, [_split(name)[1] for name in wanted], "this model")
    places: dict[str, str] = {}
    unused = []
    for name in source:
        place = _renamed(name, renames)
        if place not in wanted or _is_skipped(place, skips):
            unused.append(name)
        elif place in places:
            raise UserError(
                f"config.init_map: {places[place]} and {name} would both become {place}",
                "rename or skip one of them",
            )
        else:
            places[place] = name
    kept = {
        name: "skipped" if _is_skipped(name, skips) else "not there"
        for name in wanted
        if name not in places
    }
    return Match(places, kept, tuple(unused))


def _parse(rules: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    renames, skips = [], []
    for rule in rules:
        old, arrow, new = rule.partition("->")
        if rule.startswith("!") and len(rule) > 1 and not arrow:
            skips.append(rule[1:].strip(" /"))
        elif arrow and not rule.startswith("!"):
            renames.append((old.strip(" /"), new.strip(" /")))
        else:
            raise UserError(
                f"config.init_map: {rule!r} is no rule",
                "`old->new` renames a part of the model, `!part` leaves one as it is initialised",
            )
    return renames, skips


def _check_rule(part: str, names: Sequence[str], where: str) -> None:
    if not any(is_within(name, part) for name in names):
        raise UserError(f"config.init_map: {where} has no {part!r}", hint_for(part, names))


def _split(name: str) -> tuple[str, str]:
    """The collection of a leaf, and its name in there."""
    pieces = name.split("/")
    count = 2 if pieces[0] == "model_state" else 1
    return "/".join(pieces[:count]), "/".join(pieces[count:])


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    collection, inside = _split(name)
    for old, new in renames:
        if is_within(inside, old):
            rest = inside[len(old) :].strip("/")
            return "/".join(piece for piece in (collection, new, rest) if piece)
    return name


def _is_skipped(name: str, skips: Sequence[str]) -> bool:
    return any(is_within(_split(name)[1], part) for part in skips)


def _check_fit(
    match: Match, listed: Mapping[str, Leaf], wanted: Mapping[str, Any], rules: Sequence[str]
) -> None:
    """Refuses other shapes, and numbers of another kind; other precisions are cast."""
    others = [
        name for name, source in match.sources.items() if not _fits(listed[source], wanted[name])
    ]
    if others:
        name = others[0]
        source = match.sources[name]
        renamed = f" ({source} there)" if source != name else ""
        more = f", and {len(others) - 1} more do not fit" if others[1:] else ""
        there, here = _show(listed[source]), _show(wanted[name])
        inside = [_split(name)[1] for name in others]
        parts = dict.fromkeys(f"!{name.rpartition('/')[0] or name}" for name in inside)
        raise UserError(
            f"config.init_from: {name}{renamed} is {there} there and {here} in this model{more}",
            "leave such parts as they are initialised: "
            f"--config.init_map='{','.join([*rules, *parts])}'",
        )
    if not match.sources:
        first, ours = (", ".join([*list(names)[:3], "..."]) for names in (listed, wanted))
        raise UserError(
            f"config.init_from: none of its leaves has a place in this model: it has {first}",
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
    """The arrays in process 0; what they are, and where from, in all."""
    saved: Saved | None = None
    told: dict[str, Any] = {}
    if lift.process == 0:
        try:
            saved = read(place)
            leaves = {name: asdict(leaf) for name, leaf in saved.listed.items()}
            told = {"place": str(saved.place), "leaves": leaves}
        except CheckpointsUnreadable as error:
            told = {"message": error.message, "hint": error.hint or _PLACES}
    told = json.loads(lift.broadcast_text(json.dumps(told)))
    if "message" in told:
        raise CheckpointsUnreadable(f"config.init_from={place!r}: {told['message']}", told["hint"])
    listed = {
        name: Leaf(tuple(leaf["shape"]), leaf["dtype"], leaf["checksum"])
        for name, leaf in told["leaves"].items()
    }
    return saved.leaves if saved is not None else None, listed, told["place"]


def _tell(
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
