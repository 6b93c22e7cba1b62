"""The mesh: all devices on one axis, named "batch"."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from trainer.errors import UserError
from trainer.step import AXIS


def build_mesh(lift: str) -> Mesh:
    """All devices of the job, in the order that suits a lift.

    `pmap` needs the devices of each host side by side, as `jax.devices()` lists them; `shard_map`
    takes the order in which neighbours are joined by the fastest links.

    Raises:
        UserError: jax finds no device of the kind that was asked for.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"jax finds no device: {str(error).splitlines()[0]}",
            "unset JAX_PLATFORMS, or use --fake_devices=N for virtual CPU devices",
        ) from error
    if lift == "shard_map":
        return Mesh(mesh_utils.create_device_mesh((len(devices),), devices), (AXIS,))
    return Mesh(np.array(devices), (AXIS,))
