"""Which peers jax says that it has lost; lines as jax 0.10.2 and 0.9 print them."""

from __future__ import annotations

import pytest

from launcher.processes.failure import CONSEQUENCE, failure_from_exit
from launcher.processes.lost_peers import LostPeers

FATAL = (
    "F1129 18:35:24.79 30071 client.h:80] Terminating process because the JAX distributed service "
    "detected fatal errors. This most likely indicates that another task died; see the other task "
    "logs for more details. absl::Status: "
)
UNHEALTHY = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):"
STACK = ["*** Check failure stack trace: ***", *['  File "x.py", line 3 in f'] * 300, "4"]


@pytest.mark.parametrize(
    ("lines", "lost"),
    [
        ([FATAL + UNHEALTHY, "1", "The tasks have crashed."], "rank 1"),
        ([FATAL + UNHEALTHY, "/job:jax_worker/replica:0/task:12", "The tasks"], "rank 12"),
        ([UNHEALTHY, "3", "1", "The tasks have crashed.", FATAL], "ranks 1, 3"),
        (
            [
                FATAL + "DEADLINE_EXCEEDED: Deadline Exceeded",
                "",
                "RPC: /xla.coordination.CoordinationService/Heartbeat",
            ],
            "rank 0",
        ),
        ([FATAL + "DEADLINE_EXCEEDED: Deadline Exceeded"], "its peers"),
        (["terminate called after throwing an instance of 'gloo::EnforceNotMet'"], "its peers"),
        (["terminate called after throwing an instance of 'std::bad_alloc'"], None),
        (["7", UNHEALTHY, "7"], None),
    ],
)
def test_a_lost_peer_is_read_wherever_it_stands_in_the_log(lines, lost):
    read = LostPeers()
    for line in ["step 1", *lines, *STACK]:
        read.read(line)
    failure = failure_from_exit(-6, 2, 7, "log", read, out_of_memory=False)
    if lost is None:
        assert (failure.exit_code, failure.message) == (
            1,
            "rank 2 was killed by SIGABRT around step 7",
        )
    else:
        assert (failure.exit_code, failure.weight) == (42, CONSEQUENCE)
        assert failure.message.endswith(f"jax lost contact with {lost}")
