"""Which of several failures is the root cause."""

from __future__ import annotations

from launcher.processes.assignment import Outcome
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import (
    CONSEQUENCE,
    Failure,
    failure_from_exit,
    failure_from_outcome,
)
from launcher.processes.lost_peers import LostPeers
from launcher.rendezvous.root_cause import RootCause


def root_cause_of(*failures):
    """The decision on failures that are all reported within a moment."""
    decisions = []
    with EventLoop() as loop:
        root_cause = RootCause(loop, decisions.append, consequence_secs=0.2, hang_secs=0.2)
        for failure in failures:
            root_cause.add(failure)
        loop.run(lambda: bool(decisions))
    return decisions[0]


def test_the_cause_comes_before_its_consequences():
    gloo = Outcome(1, "JaxRuntimeError on rank 0: Gloo", lost_peer=True)
    lost_peers = LostPeers()
    lost_peers.read("jax: distributed service detected fatal errors")
    reported = [
        failure_from_outcome(gloo, 0, "log"),
        failure_from_exit(-6, 2, 7, "log", lost_peers, False),
        failure_from_exit(-9, 1, 7, "log", LostPeers(), False),
    ]
    assert reported[1].weight == CONSEQUENCE
    assert root_cause_of(*reported).rank == 1
    assert root_cause_of(*reported).exit_code == 42
    lost = root_cause_of(*reported[:2])
    assert (lost.rank, lost.exit_code) == (0, 42)
    assert lost.message.startswith("rank 0 lost contact with its peers (JaxRuntimeError on rank 0")


def test_of_ranks_that_hang_the_one_furthest_behind_is_the_root_cause():
    hangs = [Failure(rank, 42, "", count=count) for rank, count in ((0, 29), (1, 22), (2, 29))]
    assert root_cause_of(*hangs).rank == 1
    assert root_cause_of(*hangs, Failure(2, 1, "raised")).rank == 2
