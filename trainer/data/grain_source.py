"""Data that does not fit in memory, read through grain's random-access data sources."""

from __future__ import annotations

import glob as globbing
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np

from trainer.config.targets import resolve
from trainer.data.stream import ExampleRandom, HostBatch
from trainer.errors import UserError


class GrainSource:
    """A source over any grain data source or `grain.MapDataset` of records.

    A process reads only the rows it needs. podlift decides the order, so it does not depend on the
    number of processes, and a resume needs no iterator state.

    Args:
        records: random access to records: `len`, `[i]` and, optionally, the batched `__getitems__`
            (as in grain's ArrayRecordDataSource).
        parse: turns one record into a dict of arrays; None: the records are such dicts. If it has a
            parameter `random`, it receives an `ExampleRandom` of shape `()` in training.
        num_threads: how many records to parse at once; None: one per core, at least 8.
        name: the name of the record at an index, for a UserError that `parse` raises.
    """

    def __init__(
        self,
        records: Any,
        parse: Callable[..., Mapping[str, Any]] | None = None,
        num_threads: int | None = None,
        name: Callable[[int], str] = "record {}".format,
    ) -> None:
        self._records = records
        self._parse = parse
        self._name = name
        self._draws = parse is not None and _takes_random(parse)
        num_threads = num_threads or max(8, _cores())
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="podlift-read")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        batch = self._examples(np.ravel(indices), None)
        shape = np.shape(indices)
        return {name: array.reshape(*shape, *array.shape[1:]) for name, array in batch.items()}

    def augmented(self, indices: np.ndarray, random: ExampleRandom) -> HostBatch:
        """The examples `(examples,)`, parsed with random numbers if `parse` takes any."""
        return self._examples(indices, random if self._draws else None)

    def _examples(self, indices: np.ndarray, random: ExampleRandom | None) -> HostBatch:
        flat = [int(i) for i in indices]
        keywords: Sequence[Mapping[str, Any]] = [{}] * len(flat)
        if random is not None:
            keywords = [{"random": one} for one in random.split()]
        if hasattr(self._records, "__getitems__"):
            records: Sequence[Any] = self._records.__getitems__(flat)
            examples = list(self._pool.map(self._parsed, flat, records, keywords))
        else:
            examples = list(self._pool.map(self._read, flat, keywords))
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _read(self, index: int, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._parsed(index, self._records[index], keywords)

    def _parsed(self, index: int, record: Any, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._parse is None:
            return cast(Mapping[str, Any], record)
        try:
            return self._parse(record, **keywords)
        except UserError as error:
            raise UserError(f"{self._name(index)} {error.message}", error.hint) from error


def array_records(
    train: str,
    parse: str | Callable[..., Mapping[str, Any]],
    eval: str | None = None,
    num_threads: int | None = None,
) -> dict[str, Any]:
    """ArrayRecord files, named by glob patterns (`/data/train-*.array_record`).

    Args:
        train: the pattern of the training files.
        parse: `"package.module:function"`, a function that turns the bytes of a record into a dict
            of arrays, or a block that builds such a function; see `GrainSource`.
        eval: the pattern of the held-out files, if any.
        num_threads: see `GrainSource`.

    Raises:
        UserError: grain is not installed, or a pattern matches nothing.
    """
    try:
        from grain.sources import ArrayRecordDataSource
    except ImportError as error:
        raise UserError("grain is not installed", 'pip install "podlift[data]"') from error
    function = resolve(parse, "config.data.parse") if isinstance(parse, str) else parse

    def open_all(key: str, pattern: str) -> GrainSource:
        paths = sorted(globbing.glob(pattern))
        if not paths:
            raise UserError(f"config.data.{key}={pattern!r} matches no file")
        name = "record {} of config.data.{}={!r}".format
        return GrainSource(
            ArrayRecordDataSource(paths), function, num_threads, lambda i: name(i, key, pattern)
        )

    return {
        "train": open_all("train", train),
        **({"eval": open_all("eval", eval)} if eval else {}),
    }


def _takes_random(parse: Callable[..., Any]) -> bool:
    try:
        return "random" in inspect.signature(parse).parameters
    except (TypeError, ValueError):  # some C functions have no signature
        return False


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
