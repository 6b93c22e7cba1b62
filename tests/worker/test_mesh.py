"""The order of devices on the axis, on recorded TPU topologies and on CPU devices."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import jax
import pytest
from conftest import ROOT
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from launcher.worker.mesh import build_mesh, order_devices
from trainer.errors import UserError

RECORDED = ROOT / "tests/recorded"
TOPOLOGIES = ["v5e-4x4", "v5e-16x16", "v5p-4x4x4", "v5e-4x4-2slices"]
HAS_WRAPAROUND = {"v5e-16x16", "v5p-4x4x4"}
LIFTS = ["pmap", "shard_map", "vmap", "vmap:8"]


def recorded(name):
    """The devices of a topology, with the attributes that jax gives them."""
    fields = json.loads((RECORDED / f"topology-{name}.json").read_text())
    same = {field: fields.pop(field) for field in ("platform", "device_kind")}
    return [
        SimpleNamespace(**same, **dict(zip(fields, values, strict=True)))
        for values in zip(*fields.values(), strict=True)
    ]


def of_processes(*counts):
    """CPU devices, `counts` of them on each process."""
    processes = [process for process, count in enumerate(counts) for _ in range(count)]
    return [
        SimpleNamespace(id=i, process_index=process, platform="cpu", device_kind="cpu")
        for i, process in enumerate(processes)
    ]


def ids(devices):
    return [device.id for device in devices]


def runs(devices, field):
    """The values of a field along the axis, with repeats in a row dropped."""
    return [value for value, _ in itertools.groupby(getattr(d, field, 0) for d in devices)]


def hops(name, devices):
    """Links from each device to the next of its slice, and from the last to the first."""
    sizes = [max(axis) + 1 for axis in zip(*(d.coords for d in devices), strict=True)]

    def distance(a, b):
        steps = [abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)]
        if name in HAS_WRAPAROUND:
            steps = [min(n, size - n) for n, size in zip(steps, sizes, strict=True)]
        return sum(steps)

    found = []
    for _, group in itertools.groupby(devices, key=lambda d: getattr(d, "slice_index", 0)):
        of_slice = list(group)
        found += map(distance, of_slice, of_slice[1:] + of_slice[:1])
    return found


@pytest.mark.parametrize("lift", ["pmap", "vmap", "vmap:8"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_pmap_order_keeps_each_process_together(name, lift):
    devices = recorded(name)
    ordered = order_devices(devices, lift)
    processes = sorted({d.process_index for d in devices})
    assert runs(ordered, "process_index") == processes
    assert sorted(ids(ordered)) == sorted(ids(devices))


def test_pmap_order_does_not_rely_on_the_order_given():
    devices = recorded("v5e-4x4")
    rows = sorted(devices, key=lambda d: d.id)
    assert runs(rows, "process_index") != [0, 1, 2, 3]
    assert ids(order_devices(rows, "pmap")) == ids(devices)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_shard_map_order_holds_every_device_once_and_slices_together(name):
    devices = recorded(name)
    ordered = order_devices(devices, "shard_map")
    assert sorted(ids(ordered)) == sorted(ids(devices))
    assert runs(ordered, "slice_index") == sorted({getattr(d, "slice_index", 0) for d in devices})


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_shard_map_order_is_the_shorter_walk(name):
    devices = recorded(name)
    assert sum(hops(name, order_devices(devices, "shard_map"))) < sum(
        hops(name, order_devices(devices, "pmap"))
    )


@pytest.mark.parametrize("name", ["v5e-4x4", "v5e-4x4-2slices"])
def test_shard_map_order_is_a_ring_on_v5e_4x4(name):
    assert set(hops(name, order_devices(recorded(name), "shard_map"))) == {1}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_shard_map_order_mixes_processes(name):
    """Why pmap, which refuses such an order, gets another."""
    devices = recorded(name)
    ordered = order_devices(devices, "shard_map")
    assert len(runs(ordered, "process_index")) > len({d.process_index for d in devices})


def test_shard_map_order_is_that_of_a_hybrid_mesh():
    devices = recorded("v5e-4x4-2slices")
    hybrid = mesh_utils.create_hybrid_device_mesh((16,), (2,), devices)
    assert ids(order_devices(devices, "shard_map")) == ids(hybrid)


def test_slices_come_in_order_whatever_the_order_given():
    devices = recorded("v5e-4x4-2slices")
    ordered = order_devices(devices[16:] + devices[:16], "shard_map")
    assert ids(ordered) == ids(order_devices(devices, "shard_map"))


def test_cores_as_devices_keep_the_order_given():
    """mesh_utils refuses a v4 whose cores are devices of their own."""
    devices = recorded("v5p-4x4x4")
    for device in devices:
        device.core_on_chip = device.coords[2] % 2
        device.coords = [*device.coords[:2], device.coords[2] // 2]
        device.device_kind = "TPU v4"
    with pytest.raises(AssertionError, match="one device per chip"):
        mesh_utils.create_device_mesh((64,), devices)
    assert ids(order_devices(devices, "shard_map")) == ids(devices)


@pytest.mark.parametrize("per_process", [1, 2, 3, 4])
@pytest.mark.parametrize("lift", LIFTS)
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_per_process_keeps_the_first_of_each(name, lift, per_process):
    devices = recorded(name)
    ordered = order_devices(devices, lift, per_process)
    processes = {d.process_index for d in devices}
    first = [
        i for p in processes for i in ids(d for d in devices if d.process_index == p)[:per_process]
    ]
    assert sorted(ids(ordered)) == sorted(first)
    whole = ids(order_devices(devices, lift))
    assert ids(ordered) == [i for i in whole if i in first]


@pytest.mark.parametrize("lift", LIFTS)
def test_too_few_devices_for_per_process(lift):
    with pytest.raises(UserError, match=r"devices_per_process=4: process 1 has only 2") as error:
        order_devices(of_processes(4, 2, 4), lift, 4)
    assert error.value.hint == "config.devices_per_process can be 2 at most"


@pytest.mark.parametrize("lift", LIFTS)
def test_unequal_processes(lift):
    devices = of_processes(4, 2, 4, 3)
    with pytest.raises(UserError, match="process 1 has 2, process 3 has 3, the others 4") as error:
        order_devices(devices, lift)
    assert "config.devices_per_process=2" in error.value.hint
    assert ids(order_devices(devices, lift, 2)) == [0, 1, 4, 5, 6, 7, 10, 11]


@pytest.mark.parametrize(("per_process", "size"), [(None, 8), (4, 4)])
@pytest.mark.parametrize("lift", LIFTS)
def test_build_mesh(lift, per_process, size):
    built = build_mesh(lift, per_process)
    assert built.axis_names == ("batch",)
    assert built.axis_types == (AxisType.Auto,)
    assert list(built.devices) == jax.devices()[:size]


def test_no_device(monkeypatch):
    def fail():
        raise RuntimeError("Unknown backend tpu\nand more")

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match="jax finds no device") as error:
        build_mesh("pmap")
    assert error.value.message == "jax finds no device: Unknown backend tpu"
    assert "--fake_devices" in error.value.hint
