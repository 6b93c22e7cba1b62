"""Joining the other processes of a job: what jax is told, and what it must not guess."""

from __future__ import annotations

import contextlib
import inspect
import socket
import time
from collections.abc import Callable
from typing import Any

import jax

from launcher.processes.assignment import Assignment


def join(assignment: Assignment) -> None:
    """Connects this process to its peers; from here on jax sees the devices of all.

    Everything is decided by the launcher, which has seen all ranks, so jax detects nothing: its
    detection takes over variables of a scheduler that did not start this process.
    """
    if assignment.coordinator is None:
        return
    _listen_on(assignment.address)
    _keep_compiled_programs()
    if assignment.rank:
        _wait_for(assignment.coordinator, assignment.start_timeout_secs)
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


def _wait_for(coordinator: str, seconds: float) -> None:
    """Waits until jax listens there: a client that comes too early tries again only after 1 s."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        time.sleep(0.01)


def _keep_compiled_programs() -> None:
    """Lets every process keep what it compiles for the CPU, so that a restart finds it.

    jax lets process 0 alone write to its cache, but what the others look for has names of its own
    on CPU; they would compile at every start, and process 0 would wait for them. jax has no option
    for it; where its private functions are gone or take other arguments, its way stays.
    """
    try:
        from jax._src import compilation_cache, compiler
    except ImportError:
        return
    write = getattr(compiler, "_cache_write", None)
    put = getattr(compilation_cache, "put_executable_and_time", None)
    if (
        write is None
        or put is None
        or _parameters(write)[:5] != _WRITES
        or len(_parameters(put)) != 5
    ):
        return

    def write_here(
        cache_key: str,
        compile_secs: float,
        module_name: str,
        backend: Any,
        executable: Any,
        *host_callbacks: Any,  # until jax 0.10; a program that has some is not kept
    ) -> None:
        if jax.process_index() == 0 or backend.platform != "cpu" or any(host_callbacks):
            write(cache_key, compile_secs, module_name, backend, executable, *host_callbacks)
        else:
            with contextlib.suppress(Exception):  # a full disk: it is compiled again
                put(cache_key, module_name, executable, backend, int(compile_secs))

    module: Any = compiler
    module._cache_write = write_here


# What jax's private `_cache_write` takes, in every version that podlift supports.
_WRITES = ("cache_key", "compile_time_secs", "module_name", "backend", "executable")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


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
