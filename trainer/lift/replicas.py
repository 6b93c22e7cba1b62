"""Replica checks: whether all devices hold the same state, and whether it is finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from trainer.errors import ReplicasDiffer
from trainer.lift.lift import Lift
from trainer.state.checksums import are_finite, checksums
from trainer.state.leaves import name_leaves
from trainer.step.task import AXIS


@dataclass(frozen=True)
class ReplicaReport:
    """The result of a replica check.

    Attributes:
        checksums: of every leaf, by name.
        not_finite: the leaves that contain a NaN or an infinity.
    """

    checksums: dict[str, int]
    not_finite: list[str]

    @property
    def unusable(self) -> list[str]:
        """The non-finite leaves that no run can resume from; an optimizer may hold infinities."""
        return [name for name in self.not_finite if name.startswith(("params/", "model_state/"))]


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
    sums, finite = lift.read(_inspect_sharded(lift)(list(sharded.values())))
    checksum_of = report.checksums | dict(zip(sharded, sums.tolist(), strict=True))
    not_finite = [name for name, good in zip(sharded, finite, strict=True) if not good]
    return ReplicaReport(
        {name: checksum_of[name] for name in leaves},
        [name for name in leaves if name in {*report.not_finite, *not_finite}],
    )


def _check_replicated(lift: Lift, leaves: dict[str, jax.Array]) -> ReplicaReport:
    copies, finite = lift.read(_inspect_replicated(lift)(list(leaves.values())))
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
        dict(zip(names, copies[0].tolist(), strict=True)),
        [name for name, good in zip(names, finite, strict=True) if not good],
    )


@functools.cache
def _inspect_replicated(lift: Lift) -> Callable[[Any], Any]:
    """Checksums of each device's copy, `(devices, leaves)`, and finiteness, `(leaves,)`."""

    def inspect(tree: Any) -> Any:
        return jax.lax.all_gather(checksums(tree), AXIS), are_finite(tree)

    return jax.jit(lift.shard_map(inspect, P(), P()))


@functools.cache
def _inspect_sharded(lift: Lift) -> Callable[[Any], Any]:
    """Checksums and finiteness of sharded leaves, both `(leaves,)`; the compiler adds up shards."""
    return lift.compile_replicated(lambda tree: (checksums(tree), are_finite(tree)))
