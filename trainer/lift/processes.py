"""The processes of a run, and what they tell each other beside the steps: always all at once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

# Of a state that one process gives to the others, at a time: the devices hold no more of it twice.
_BROADCAST_BYTES = 64 << 20


@dataclass(frozen=True)
class Processes:
    """The processes that the devices of a mesh belong to.

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
        """Whether this process is the one that writes what the processes share."""
        return jax.process_index() == 0

    @property
    def process(self) -> int:
        """This process's rank."""
        return jax.process_index()

    def gather(self, numbers: Any) -> list[Any]:
        """What each process gives, in order of rank, to agree on what only files can tell.

        All processes must call it at the same point.

        Args:
            numbers: an int, or an array of the same shape in all processes; of 32 bits.
        """
        if self.num_processes == 1:
            return np.array(numbers)[None].tolist()
        return multihost_utils.process_allgather(np.array(numbers)).tolist()

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """The text of one process, in all of them; called by all at the same point."""
        if self.num_processes == 1:
            return text
        data = np.frombuffer(text.encode(), np.uint8)
        size = self.gather(data.size)[source]
        padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # compiles seldom
        if self.process == source:
            padded[:size] = data
        return _broadcast(padded, self.process == source)[:size].tobytes().decode()

    def broadcast_arrays(
        self, leaves: Mapping[str, np.ndarray] | None, like: Mapping[str, Any], source: int
    ) -> dict[str, np.ndarray]:
        """Named arrays of one process, bit for bit in all of them; called by all at the same point.

        Args:
            leaves: the arrays, where this is the process that has them.
            like: their shapes and dtypes, the same in all processes.
            source: the process that has them.
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
            part = slice(start, start + _BROADCAST_BYTES)
            data[part] = _broadcast(data[part], here)
        return {
            name: data[places[name]].copy().view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)
            for name, leaf in like.items()
        }


def _broadcast(data: np.ndarray, is_source: bool) -> np.ndarray:
    """Bytes of one process, in all of them; a multiple of four.

    It is a sum over the processes, so of integers: a sum of floats would lose a -0.0.
    """
    words = multihost_utils.broadcast_one_to_all(data.view(np.uint32), is_source)
    return np.array(words, np.uint32).view(np.uint8)
