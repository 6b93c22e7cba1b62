"""Replica checks: whether all devices hold the same state, and whether it is finite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from trainer.errors import NonFiniteState, ReplicasDiffer
from trainer.lift.lift import Lift
from trainer.state.checksums import checksums, finiteness
from trainer.state.finite import allows_infinity, must_be_usable
from trainer.state.leaves import name_leaves
from trainer.step.task import AXIS


@dataclass(frozen=True)
class ReplicaReport:
    """The result of a replica check.

    Attributes:
        checksums: of every leaf, by name.
        not_finite: the leaves that contain a NaN or an infinity, each with whether it is a NaN.
    """

    checksums: dict[str, int]
    not_finite: dict[str, bool]

    @property
    def unusable(self) -> list[str]:
        """The leaves that no run can resume from; see `trainer.state.finite`."""
        return [
            name
            for name, is_nan in self.not_finite.items()
            if must_be_usable(name) and (is_nan or not allows_infinity(name))
        ]


def check_replicas(lift: Lift, state: Any) -> ReplicaReport:
    """Checks that all devices hold the same bits, and computes checksums and finiteness.

    `jax` itself does not notice: an output declared replicated whose copies differ raises nothing
    and claims `is_fully_replicated`. All processes call this at the same point.

    Raises:
        ReplicasDiffer: names the first leaf whose copies differ, and the devices.
    """
    leaves = name_leaves(lift.to_global(state))
    sharded = {name: leaf for name, leaf in leaves.items() if not leaf.is_fully_replicated}
    report = _check_replicated(lift, {n: leaf for n, leaf in leaves.items() if n not in sharded})
    if not sharded:
        return report
    sums, kinds = lift.read(_inspect_sharded(lift)(list(sharded.values())))
    checksum_of = report.checksums | dict(zip(sharded, sums.tolist(), strict=True))
    not_finite = report.not_finite | _not_finite(sharded, kinds)
    return ReplicaReport(
        {name: checksum_of[name] for name in leaves},
        {name: not_finite[name] for name in leaves if name in not_finite},
    )


def _not_finite(names: Iterable[str], kinds: np.ndarray) -> dict[str, bool]:
    pairs = zip(names, kinds.tolist(), strict=True)
    return {name: kind == 2 for name, kind in pairs if kind}


def check_usable(lift: Lift, state: Any, step: int) -> None:
    """Checks that params and model state are what `trainer.state.finite` asks for.

    Cheaper than `check_replicas`, which finds the same. All processes call this at the same point.

    Raises:
        NonFiniteState: names the first leaf that is not.
    """
    leaves = name_leaves(lift.to_global(state))
    used = {name: leaf for name, leaf in leaves.items() if must_be_usable(name)}
    kinds = lift.read(_find_non_finite(lift)(list(used.values())))
    if unusable := ReplicaReport({}, _not_finite(used, kinds)).unusable:
        raise NonFiniteState(step, unusable)


def _check_replicated(lift: Lift, leaves: dict[str, jax.Array]) -> ReplicaReport:
    copies, kinds = lift.read(_inspect_replicated(lift)(list(leaves.values())))
    names = list(leaves)
    differing = np.flatnonzero((copies != copies[0]).any(axis=0))
    if differing.size:
        first = differing[0]
        devices = [
            str(lift.mesh.devices.flat[place])
            for place in np.flatnonzero(copies[:, first] != copies[0, first])
        ]
        raise ReplicasDiffer(
            f"{names[first]} differs between devices ({differing.size} of {len(names)} leaves "
            f"do): {', '.join(devices[:4])}{', ...' if devices[4:] else ''} against "
            f"{lift.mesh.devices.flat[0]}\n  HINT: a value of the model's state depends on "
            'the shard; reduce it in the model with lax.pmean(value, "batch")'
        )
    return ReplicaReport(
        dict(zip(names, copies[0].tolist(), strict=True)), _not_finite(names, kinds)
    )


@functools.cache
def _inspect_replicated(lift: Lift) -> Callable[[Any], Any]:
    """Checksums of each device's copy, `(devices, leaves)`, and finiteness, `(leaves,)`."""

    def inspect(tree: Any) -> Any:
        return jax.lax.all_gather(checksums(tree), AXIS), finiteness(tree)

    return jax.jit(lift.shard_map(inspect, P(), P()))


@functools.cache
def _inspect_sharded(lift: Lift) -> Callable[[Any], Any]:
    """Checksums and finiteness of sharded leaves, both `(leaves,)`; the compiler adds up shards."""
    return lift.compile_replicated(lambda tree: (checksums(tree), finiteness(tree)))


@functools.cache
def _find_non_finite(lift: Lift) -> Callable[[Any], Any]:
    return lift.compile_replicated(finiteness)
