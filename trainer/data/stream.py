"""The order of examples: a pure function of (seed, step).

It does not depend on the number of processes or devices, and a resume needs no saved iterator.
Positions count examples from the start of training. With batches of B examples, step s covers the
positions [s * B, (s + 1) * B). Epoch e covers [e * E, (e + 1) * E), where E is the largest multiple
of B that the data allows (the remainder of an epoch is dropped).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import jax
import numpy as np

from trainer.errors import UserError

HostBatch = dict[str, np.ndarray]
Augment = Callable[[HostBatch, "ExampleRandom"], HostBatch]
SourceAugment = Callable[[np.ndarray, "ExampleRandom"], HostBatch]


class Source(Protocol):
    """Random access to examples.

    A source may also have a method `augmented(indices, random)`, for `indices` of shape
    `(examples,)` and an `ExampleRandom` of their positions. It returns the same examples, augmented
    before they are brought to one size. Training then calls it instead; evaluation never does.
    """

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        """The examples of an integer array; each value has shape `indices.shape + (...)`."""


class ArraySource:
    """A source over a dict of arrays in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.arrays = dict(arrays)
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if "x" not in lengths or len(set(lengths.values())) != 1:
            raise UserError(
                f"config.data: the arrays have the lengths {lengths}",
                'return arrays of one length, one of them named "x"',
            )
        self.length = lengths["x"]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        return {name: _gather(array, indices) for name, array in self.arrays.items()}


def _gather(array: Any, indices: np.ndarray) -> Any:
    # Takes less than half the time of indexing; but with another layout it copies the full array.
    if isinstance(array, np.ndarray) and array.flags.c_contiguous:
        return array.take(indices, axis=0)
    return array[indices]


def as_source(value: Any, where: str) -> Source:
    """Turns what a data target returned into a source.

    Args:
        value: a dict of arrays, or a source.
        where: what to call it in an error message.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, Mapping):
        return ArraySource(value)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return cast(Source, value)
    raise UserError(
        f"{where} is a {type(value).__name__}",
        "return a dict of arrays, or an object with len() and [indices]",
    )


class ExampleRandom:
    """Random numbers that depend only on the seed and the position of each example.

    They come from the output function of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), evaluated at all positions at once.
    """

    def __init__(self, seed: int, positions: np.ndarray) -> None:
        self._keys = _mix(_mix(np.uint64(seed)) ^ positions.astype(np.uint64))
        self._draws = 0

    def uniform(self, count: int) -> np.ndarray:
        """New float64 numbers in [0, 1), of shape `positions.shape + (count,)`."""
        return cast(np.ndarray, (self._words(count) >> np.uint64(11)) * 2.0**-53)

    def split(self) -> list[ExampleRandom]:
        """One generator of shape `()` per position, for threads that process one example each."""
        generators = []
        for key in self._words(1).ravel():
            generator = copy.copy(self)
            generator._keys, generator._draws = key, 0
            generators.append(generator)
        return generators

    def _words(self, count: int) -> np.ndarray:
        draws = np.arange(self._draws + 1, self._draws + count + 1, dtype=np.uint64)
        self._draws += count
        return cast(np.ndarray, _mix(self._keys[..., None] + draws * _GAMMA))


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: Any) -> Any:
    with np.errstate(over="ignore"):
        z = z + _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


class TrainStream:
    """Training batches: `f(seed, step)` is the global batch; each process takes its rows of it.

    Args:
        source: the examples.
        global_batch_size: rows per step, over all processes and devices.
        seed: seeds the order and the augmentation.
        shuffle: draw a new permutation each epoch. If one batch holds all examples, their order is
            kept, because no update depends on it.
        augment: `(batch, ExampleRandom) -> batch` on arrays `(examples, ...)`.

    Raises:
        UserError: there are fewer examples than `global_batch_size`.
    """

    def __init__(
        self,
        source: Source,
        global_batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        augment: Augment | None = None,
    ) -> None:
        if len(source) < global_batch_size:
            raise UserError(
                f"config.global_batch_size={global_batch_size} is more than the "
                f"{len(source)} training examples",
                f"set config.global_batch_size to {len(source)} or less",
            )
        self.source = source
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = len(source) // global_batch_size
        self._seed = seed
        self._shuffle = shuffle and len(source) != global_batch_size
        self._augment = augment
        self._augmented: SourceAugment | None = getattr(source, "augmented", None)
        self._orders: dict[int, np.ndarray] = {}

    def batch_at(self, step: int, rows: slice | np.ndarray = slice(None)) -> HostBatch:
        """The given rows of the global batch of one step; each array is `(rows, ...)`."""
        return {name: array[0] for name, array in self.batches_at(step, 1, rows).items()}

    def batches_at(
        self, step: int, steps: int, rows: slice | np.ndarray = slice(None)
    ) -> HostBatch:
        """The given rows for several consecutive steps; each array is `(steps, rows, ...)`."""
        positions = self._positions(step, steps, rows)
        indices = self._indices(positions)
        if self._augment is None and self._augmented is None:
            return self.source[indices]
        shape, indices = positions.shape, indices.ravel()
        random = ExampleRandom(self._seed, positions.ravel())
        # Both augmentations draw from one generator, so they share no random number.
        batch = self._augmented(indices, random) if self._augmented else self.source[indices]
        if self._augment is not None:
            batch = self._augment(batch, random)
        return {name: array.reshape(*shape, *array.shape[1:]) for name, array in batch.items()}

    def indices_at(
        self, step: int, steps: int, rows: slice | np.ndarray = slice(None)
    ) -> np.ndarray:
        """The indices of these examples in the source, `(steps, rows)`."""
        return self._indices(self._positions(step, steps, rows))

    def _positions(self, step: int, steps: int, rows: slice | np.ndarray) -> np.ndarray:
        size = self.global_batch_size
        return step * size + np.arange(steps * size).reshape(steps, size)[:, rows]

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and dtypes of a batch with this many rows."""
        return {
            name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)
            for name, array in self.batch_at(0, slice(0, 1)).items()
        }

    def _indices(self, positions: np.ndarray) -> np.ndarray:
        epochs, offsets = np.divmod(positions, self.steps_per_epoch * self.global_batch_size)
        if not self._shuffle:
            return offsets
        if epochs.size and epochs.flat[0] == epochs.flat[-1]:
            return self._order(int(epochs.flat[0]))[offsets]
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._order(int(epoch))[offsets[here]]
        return indices

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self.source))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order
        return order


def eval_batches(
    source: Source, batch_size: int, rows: slice | np.ndarray = slice(None)
) -> Iterator[HostBatch]:
    """Yields every example once, in order; `mask` is 0.0 for the padding of the last batch.

    Args:
        source: the examples.
        batch_size: rows per batch, over all processes and devices.
        rows: which of these rows to yield.
    """
    for start in range(0, len(source), batch_size):
        positions = (start + np.arange(batch_size))[rows]
        real = positions < len(source)
        batch = source[np.where(real, positions, len(source) - 1)]
        mask = real.astype(np.float32)
        yield {**batch, "mask": batch["mask"] * mask if "mask" in batch else mask}
