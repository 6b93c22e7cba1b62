"""Connects a process to its peers through `jax.distributed`, with nothing left for jax to guess."""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import time
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import jax

from launcher.processes.assignment import Assignment
from trainer.xla_flags import add_option

# A backstop for jax's own timeouts, in seconds: a week. The launchers find lost hosts, and ranks
# that make no progress, on monotonic clocks. jax counts heartbeats on the wall clock: with a
# timeout short enough to find anything, a step of the clock or a suspended process would end the
# job, and jax would name the wrong rank.
BACKSTOP_SECS = 7 * 24 * 3600
# XLA's limit for one collective on CPU: by default half an hour, which loading data may take.
_COLLECTIVE_TIMEOUT = "--xla_cpu_collective_timeout_seconds"


def join(assignment: Assignment) -> None:
    """Connects this process to its peers; afterwards `jax.devices()` lists the devices of all.

    The launcher, which has seen all ranks, decides everything. jax's own detection would obey the
    variables of a scheduler that did not start this process.
    """
    if assignment.coordinator is None:
        return
    # The launcher, not XLA, decides how long a process may wait in a collective on CPU.
    add_option(os.environ, f"{_COLLECTIVE_TIMEOUT}={BACKSTOP_SECS}")
    _listen_on(assignment.address)
    host = assignment.coordinator.rpartition(":")[0].strip("[]")
    bypass_proxies(os.environ, (host, assignment.address))
    with contextlib.suppress(AttributeError):  # it would warn of proxies, on every rank
        jax.config.update("jax_check_proxy_envs", False)
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
        # The default is all interfaces.
        coordinator_bind_address=assignment.coordinator,
        heartbeat_timeout_seconds=BACKSTOP_SECS,
        shutdown_timeout_seconds=assignment.shutdown_timeout_secs,
    )


def leave() -> None:
    """Disconnects from the peers."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


# The variables in which gRPC looks for a proxy. It takes no notice of the others.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")


def bypass_proxies(environ: MutableMapping[str, str], hosts: Iterable[str]) -> None:
    """Lets gRPC reach the hosts of the job directly, where the environment names a proxy.

    jax's connection to its coordinator is gRPC, which would go through the proxy, also to an
    address of this machine; a proxy that does not know the address holds up the start for minutes.
    gRPC reads the exceptions in `no_grpc_proxy`, and those in `no_proxy` only where that is not
    set, so the entries of the user are kept.

    Args:
        environ: changed in place.
        hosts: names or addresses.
    """
    if not any(environ.get(name) for name in _PROXIES):
        return
    given = environ.get("no_grpc_proxy", environ.get("no_proxy", ""))
    entries = [entry.strip() for entry in given.split(",")]
    entries += ["localhost", "127.0.0.1", "::1", *hosts]
    environ["no_grpc_proxy"] = ",".join(dict.fromkeys(filter(None, entries)))


def _wait_for(coordinator: str, seconds: float) -> None:
    """Waits until jax's coordinator listens: a client that is too early retries only after 1 s."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
            return
        time.sleep(0.01)


def _keep_compiled_programs() -> None:
    """Lets every process write its CPU programs to jax's compilation cache.

    In jax only process 0 writes, but on CPU every process looks up its own keys, so the others
    would compile at every start while process 0 waits. jax has no option for this; if its private
    functions are missing or take other arguments, nothing changes.
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
        *host_callbacks: Any,  # until jax 0.10; a program that has some is not cached
    ) -> None:
        if jax.process_index() == 0 or backend.platform != "cpu" or any(host_callbacks):
            write(cache_key, compile_secs, module_name, backend, executable, *host_callbacks)
        else:
            with contextlib.suppress(Exception):  # a full disk: the next start compiles again
                put(cache_key, module_name, executable, backend, int(compile_secs))

    module: Any = compiler
    module._cache_write = write_here


# The first parameters of jax's private `_cache_write`, in every version that podlift supports.
_WRITES = ("cache_key", "compile_time_secs", "module_name", "backend", "executable")


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _listen_on(address: str) -> None:
    """Makes gloo, for CPU collectives, listen on one address.

    By default it listens on whatever the host name resolves to: on many machines a loopback address
    that no other host can reach, on others an address that should not be open. jax has no option
    for this; if its private function is missing, the default stays.
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
