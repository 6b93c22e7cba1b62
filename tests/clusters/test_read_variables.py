"""Addresses, visible accelerators and shares of them, read from variables."""

from __future__ import annotations

import pytest

from launcher.clusters.read import device_share, parse_address, visible_devices
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("visible", "on_node", "tasks", "local_rank", "bound", "expected"),
    [
        (4, 4, 1, 0, False, None),
        (8, 8, 4, 3, False, (6, 7)),
        (4, 4, 4, 0, False, (0,)),
        (4, None, 4, 1, False, (1,)),
        (None, None, 4, 1, False, None),
        (0, 4, 4, 1, False, None),
        (1, 4, 4, 3, False, None),  # CUDA_VISIBLE_DEVICES=$SLURM_LOCALID
        (1, None, 4, 3, False, None),
        (2, 4, 2, 1, True, None),
        (2, 4, 2, 1, False, (1,)),
        (4, 4, 2, 1, True, (2, 3)),
        (2, 4, 4, 1, False, UserError),  # pairs of tasks near the same two devices
        (1, 1, 2, 1, False, UserError),
        (3, 3, 2, 0, False, UserError),
    ],
)
def test_devices_are_shared_only_by_tasks_that_see_the_same_ones(
    visible, on_node, tasks, local_rank, bound, expected
):
    arguments = (visible, on_node, tasks, local_rank, bound, "hint")
    if expected is UserError:
        with pytest.raises(UserError, match="cannot share"):
            device_share(*arguments)
    else:
        assert device_share(*arguments) == expected


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,GPU-46309653"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0", "ROCR_VISIBLE_DEVICES": "0,1"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3", "HIP_VISIBLE_DEVICES": "0,1"}, 2),
    ],
)
def test_visible_devices_are_counted(env, expected):
    assert visible_devices(env) == expected


@pytest.mark.parametrize(
    "text", ["", ":1", "a b:1", "a:b", "a:70000", "[a", "[fd00::1]x:1", "a:1:2"]
)
def test_a_malformed_address_is_refused(text):
    with pytest.raises(UserError, match="not an address"):
        parse_address(text, "--flag", 1)
