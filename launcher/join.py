"""Joining the other processes of a job: what jax is told, and what it must not guess."""

from __future__ import annotations

from typing import Any

import jax

from launcher.assignment import Assignment


def join(assignment: Assignment) -> None:
    """Connects this process to its peers; from here on jax sees the devices of all.

    Everything is decided by the launcher, which has seen all ranks, so jax detects nothing: its
    detection takes over variables of a scheduler that did not start this process.
    """
    if assignment.coordinator is None:
        return
    _listen_on(assignment.address)
    jax.distributed.initialize(
        coordinator_address=assignment.coordinator,
        num_processes=assignment.num_processes,
        process_id=assignment.rank,
        local_device_ids=assignment.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=assignment.start_timeout_secs,
        # By default it would listen on all interfaces.
        coordinator_bind_address=assignment.coordinator,
        # A backstop: launchers notice a lost peer themselves, sooner and without an abort.
        heartbeat_timeout_seconds=2 * assignment.heartbeat_timeout_secs,
        shutdown_timeout_seconds=assignment.shutdown_timeout_secs,
    )


def leave() -> None:
    """Says goodbye to the peers."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _listen_on(address: str) -> None:
    """Lets CPU collectives listen on one address.

    By default gloo listens on whatever the machine's host name resolves to: on many machines that
    is a loopback address that no other host can reach, on others one that should not be open. jax
    has no option for it; where its private function is gone, the default stays.
    """
    try:
        from jax._src.lib import _jax  # type: ignore[attr-defined]
    except ImportError:
        return
    make = getattr(_jax, "make_gloo_tcp_collectives", None)
    if make is None:
        return

    def make_on_address(distributed_client: Any, **options: Any) -> Any:
        return make(distributed_client=distributed_client, **{"hostname": address, **options})

    _jax.make_gloo_tcp_collectives = make_on_address
