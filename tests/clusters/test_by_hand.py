"""The placement that three flags give."""

from __future__ import annotations

import pytest

from launcher.clusters.detect import by_hand
from trainer.errors import UserError


def test_a_placement_by_hand():
    found = by_hand(" [fd00::1]:8476 ", 4, 3, {"PODLIFT_RESTART_ATTEMPT": "2"})
    assert (found.cluster, found.host, found.port) == ("by hand", "fd00::1", 8476)
    assert (found.num_processes, found.process_id, found.attempt) == (4, 3, 2)
    assert found.job == "by hand [fd00::1]:8476"
    assert (found.local_device_ids, found.variables) == (None, ())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, 2, 0), "--coordinator_address is missing"),
        (("a:1", None, None), "--num_processes and --process_id are missing"),
        (
            ("a", 2, 0),
            "--coordinator_address=a: not an address\n  HINT: --coordinator_address=HOST",
        ),
        (("a:0", 2, 0), "not an address"),
        (("fd00::1:8476", 2, 0), "HOST:PORT, or [IPV6]:PORT"),
        (("a:1", 2, 2), "process 2 is not in 0..1"),
        (("a:1", 2, -1), "process -1 is not in 0..1"),
        (("a:1", 0, 0), "a job of 0 processes"),
    ],
)
def test_a_placement_by_hand_is_checked(arguments, expected):
    with pytest.raises(UserError) as error:
        by_hand(*arguments, env={})
    assert expected in str(error.value)
