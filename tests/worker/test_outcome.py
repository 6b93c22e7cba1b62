"""What becomes of an exception in a worker."""

from __future__ import annotations

from launcher.worker.run import _outcome_of


def test_a_network_error_is_a_lost_peer_only_where_jax_raised_it_and_there_are_peers():
    def outcome(error, has_peers):
        def train():
            raise error

        return _outcome_of(train, 0, has_peers=has_peers)

    gloo = RuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert outcome(gloo, True).lost_peer
    assert not outcome(gloo, False).lost_peer
    of_the_data = outcome(ConnectionResetError(104, "Connection reset by peer"), True)
    assert not of_the_data.lost_peer
    assert "ConnectionResetError" in of_the_data.trace
