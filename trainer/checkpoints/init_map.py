"""`config.init_map`: which leaf of another run initialises which leaf of a new model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.state.subtrees import hint_for, is_within


@dataclass(frozen=True)
class Match:
    """Which source leaf initialises which leaf. All names are full: "params/Dense_0/kernel".

    Attributes:
        sources: the source leaf, by the leaf of the new model that it initialises.
        kept: leaves of the new model that keep their initial values, and why.
        unused: source leaves that initialise nothing.
    """

    sources: Mapping[str, str]
    kept: Mapping[str, str]
    unused: tuple[str, ...]


def match_leaves(
    source: Sequence[str] | Mapping[str, Any],
    wanted: Sequence[str] | Mapping[str, Any],
    rules: Sequence[str],
) -> Match:
    """Matches leaves by name.

    Rules apply to names inside a collection, so `old->new` renames both the params and the
    statistics of a module. The first rule that fits a leaf counts.

    Args:
        source: full names of the source leaves, such as "params/Dense_0/kernel".
        wanted: the same of the new model.
        rules: `old->new` renames a part of the model, `!part` keeps one as initialised.

    Raises:
        UserError: a rule is malformed or fits nothing, or two leaves have the same place.
    """
    renames, skips = _parse(rules)
    inside = [split_collection(name)[1] for name in source]
    for old, _ in renames:
        _check_rule(old, inside, "the checkpoint of config.init_from")
    for part in skips:
        _check_rule(part, [split_collection(name)[1] for name in wanted], "this model")
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
        name: "skipped" if _is_skipped(name, skips) else "not in the checkpoint"
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
                f"config.init_map: {rule!r} is not a rule",
                "`old->new` renames a part of the model, `!part` keeps one as initialised",
            )
    return renames, skips


def _check_rule(part: str, names: Sequence[str], where: str) -> None:
    if not any(is_within(name, part) for name in names):
        raise UserError(f"config.init_map: {where} has no {part!r}", hint_for(part, names))


def split_collection(name: str) -> tuple[str, str]:
    """The collection of a leaf, such as "params" or "model_state/batch_stats", and the rest."""
    pieces = name.split("/")
    count = 2 if pieces[0] == "model_state" else 1
    return "/".join(pieces[:count]), "/".join(pieces[count:])


def _renamed(name: str, renames: Sequence[tuple[str, str]]) -> str:
    collection, inside = split_collection(name)
    for old, new in renames:
        if is_within(inside, old):
            rest = inside[len(old) :].strip("/")
            return "/".join(piece for piece in (collection, new, rest) if piece)
    return name


def _is_skipped(name: str, skips: Sequence[str]) -> bool:
    return any(is_within(split_collection(name)[1], part) for part in skips)
