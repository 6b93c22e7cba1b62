"""Communication between the processes of a run, beside the steps; all of them take part at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

# A state is broadcast in pieces of this size, which bounds the extra memory on the devices.
_BROADCAST_BYTES = 64 << 20


@dataclass(frozen=True)
class Processes:
    """The processes that the devices of a mesh belong to.

    Every process must call `gather` and the broadcasts at the same point.

    Attributes:
        mesh: the devices.
    """

    mesh: Mesh

    @functools.cached_property
    def num_processes(self) -> int:
        """How many processes the devices belong to."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def writes(self) -> bool:
        """Whether this process writes the files that all processes share: it is process 0."""
        return jax.process_index() == 0

    @property
    def process(self) -> int:
        """This process's rank."""
        return jax.process_index()

    def gather(self, numbers: Any) -> list[Any]:
        """Gathers one value per process, in the order of ranks.

        Args:
            numbers: an int, or an array of the same shape in all processes; of 32 bits.
        """
        if self.num_processes == 1:
            return cast(list[Any], np.array(numbers)[None].tolist())
        return cast(list[Any], multihost_utils.process_allgather(np.array(numbers)).tolist())

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """Returns the text of the process `source` in all processes."""
        if self.num_processes == 1:
            return text
        data = np.frombuffer(text.encode(), np.uint8)
        size = self.gather(data.size)[source]
        padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # few compilations
        if self.process == source:
            padded[:size] = data
        return _broadcast(padded, self.process == source)[:size].tobytes().decode()

    def broadcast_arrays(
        self, leaves: Mapping[str, np.ndarray] | None, like: Mapping[str, Any], source: int
    ) -> dict[str, np.ndarray]:
        """Returns the named arrays of the process `source` in all processes, bit for bit.

        Args:
            leaves: the arrays; ignored in all processes but `source`.
            like: their shapes and dtypes, equal in all processes.
            source: the rank of the process that has them.
        """
        here = self.process == source
        if self.num_processes == 1:
            assert leaves is not None
            return dict(leaves)
        sizes = {
            name: int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
            for name, leaf in like.items()
        }
        total = sum(sizes.values())
        data = np.zeros(-(-total // 4) * 4, np.uint8)
        places, start = {}, 0
        for name, size in sizes.items():
            places[name] = slice(start, start + size)
            if here:
                assert leaves is not None
                flat = np.ascontiguousarray(leaves[name]).reshape(-1)
                data[places[name]] = flat.view(np.uint8)
            start += size
        for start in range(0, data.size, _BROADCAST_BYTES):
            piece = slice(start, start + _BROADCAST_BYTES)
            data[piece] = _broadcast(data[piece], here)
        return {
            name: data[places[name]].copy().view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)
            for name, leaf in like.items()
        }


def _broadcast(data: np.ndarray, is_source: bool) -> np.ndarray:
    """Broadcasts bytes, a multiple of four.

    jax implements it as a sum over the processes, so it must be one of integers: a sum of floats
    would turn -0.0 into 0.0.
    """
    words = multihost_utils.broadcast_one_to_all(data.view(np.uint32), is_source)
    return np.array(words, np.uint32).view(np.uint8)
