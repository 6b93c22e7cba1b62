"""Connects the devices of CPU processes, before anything takes a different time in each of them."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launcher.worker.join import BACKSTOP_SECS
from trainer.lift.processes import Processes


def connect(mesh: Mesh) -> None:
    """Connects the devices of all CPU processes, while all processes are here.

    gloo connects the devices of a collective when the first process needs it, and gives the others
    30 s to get there, which jax has no option for: a process that is still loading its data would
    end the job. Once they are connected, the launcher decides how long a process may wait.

    Args:
        mesh: the devices that the run trains on. Other collectives are between processes.
    """
    if jax.default_backend() != "cpu" or jax.process_count() == 1:
        return
    with contextlib.suppress(ImportError, AttributeError):  # private; without it, they may be late
        from jax._src import distributed

        client: Any = distributed.global_state.client
        client.wait_at_barrier("podlift/connect", BACKSTOP_SECS * 1000)
    Processes(mesh).gather(0)
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.ones(1, np.int32))
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(ones))
