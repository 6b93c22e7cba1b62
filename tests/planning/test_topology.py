"""Names of topologies."""

import pytest

from launcher.planning.topology import is_topology, known_topologies, parse_topology
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("name", "slices", "chips", "devices"),
    [
        ("v5e:16x16", 1, 256, 256),
        ("v5e-256", 1, 256, 256),
        ("v5litepod-4", 1, 4, 4),
        ("v4-8", 1, 4, 8),
        ("v3-8", 1, 4, 8),
        ("v6e:8x8", 2, 128, 128),
        ("v4:2x2x1", 1, 4, 8),
        ("v3:4x4", 1, 16, 32),
        ("v7x:2x2x1", 1, 4, 8),
        ("gpu:h100:2x8", 1, 16, 16),
        ("gpu:a100:3x2x8", 1, 48, 48),
        ("gpu:l4:1x1", 1, 1, 1),
        ("cpu:12", 1, 12, 12),
    ],
)
def test_a_name_says_how_many(name, slices, chips, devices):
    topology = parse_topology(name, slices)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5e:16x61", "v5e:16x16"),
        ("v5e:4x4x4", "v5e:4x4"),
        ("v4:2x2", "v4:2x2x1"),
        ("h100:1x8", "gpu:h100:1x4x8"),
        ("gpu:h200:1x8", "gpu:h100"),
        ("v9:2x2", "v2:2x2"),
        ("cpu:0", "cpu:8"),
        ("v5e-3", "v5e:"),
        ("pod", "v5e:4x4"),
    ],
)
def test_an_unknown_name_lists_those_near_it(name, near):
    with pytest.raises(UserError) as error:
        parse_topology(name)
    assert near in str(error.value)


def test_known_names_are_read():
    for name in known_topologies():
        assert is_topology(name)
        assert parse_topology(name).num_chips >= 1


def test_lifts_and_configs_are_no_topologies():
    assert not any(
        map(is_topology, ("pmap", "shard_map", "configs/mlp.py", "configs/digits.py:resnet"))
    )
