"""The mesh: all devices of the job on one axis, "batch"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from trainer.errors import UserError
from trainer.step.task import AXIS


def build_mesh(lift: str, devices_per_process: int | None = None) -> Mesh:
    """A mesh of the job's devices, in the order that a lift needs.

    Args:
        lift: `config.lift`.
        devices_per_process: number of devices to use of each process; None for all of them.

    Raises:
        UserError: jax finds no device of the requested platform, or `order_devices` refuses the
            devices.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"jax finds no device: {str(error).splitlines()[0]}",
            "unset JAX_PLATFORMS, or use --fake_devices=N for virtual CPU devices",
        ) from error
    return Mesh(np.array(order_devices(devices, lift, devices_per_process)), (AXIS,))


def order_devices(devices: Sequence[Any], lift: str, per_process: int | None = None) -> list[Any]:
    """Devices in the order that a lift needs. Needs no backend of jax.

    `shard_map` takes them slice by slice, and within a slice in the order of `mesh_utils`, where
    neighbours are linked: a ring on v5e:4x4, row by row on larger slices. In that order a host's
    devices are not contiguous. `pmap` accepts only orders in which they are.

    Args:
        devices: as in `jax.devices()`; each needs `process_index`, and on a TPU also `coords`,
            `core_on_chip` and, if there are several slices, `slice_index`.
        lift: `config.lift`.
        per_process: number of devices to use of each process, the first ones; None for all.

    Raises:
        UserError: processes have different numbers of devices, or fewer than `per_process`.
    """
    by_process = sorted(devices, key=lambda device: device.process_index)
    counts = Counter(device.process_index for device in by_process)
    if per_process is None:
        _check_equal(counts)
    else:
        _check_enough(counts, per_process)
    ordered = _slice_by_slice(devices) if lift == "shard_map" else by_process
    if per_process is None:
        return ordered
    # Filtered last: mesh_utils refuses devices whose coordinates do not fill a box.
    used = _first_of_each(by_process, per_process)
    return [device for device in ordered if device.id in used]


def _slice_by_slice(devices: Sequence[Any]) -> list[Any]:
    """The order of `create_hybrid_device_mesh` on one axis, for any number of slices."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [device for index in sorted(slices) for device in _neighbours(slices[index])]


def _neighbours(devices: list[Any]) -> list[Any]:
    try:
        return list(mesh_utils.create_device_mesh((len(devices),), devices).flat)
    except AssertionError:
        # A slice with a hole, or a v4 on which each core is a device. The order affects speed only.
        return devices


def _first_of_each(by_process: list[Any], per_process: int) -> set[int]:
    """The ids of the first `per_process` devices of each process."""
    seen: Counter[int] = Counter()
    used = set()
    for device in by_process:
        if seen[device.process_index] < per_process:
            used.add(device.id)
        seen[device.process_index] += 1
    return used


def _check_equal(counts: Counter[int]) -> None:
    usual = Counter(counts.values()).most_common(1)[0][0]
    odd = [f"process {p} has {count}" for p, count in counts.items() if count != usual]
    if odd:
        raise UserError(
            f"processes hold different numbers of devices: {', '.join(odd)}, the others {usual}",
            f"config.devices_per_process={min(counts.values())} uses that many of each",
        )


def _check_enough(counts: Counter[int], per_process: int) -> None:
    process, fewest = min(counts.items(), key=lambda item: item[1])
    if fewest < per_process:
        raise UserError(
            f"config.devices_per_process={per_process}: process {process} has only {fewest}",
            f"config.devices_per_process can be {fewest} at most",
        )
