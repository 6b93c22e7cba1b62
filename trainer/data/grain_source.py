"""Files that do not fit in memory, read through grain's random-access data sources."""

from __future__ import annotations

import glob as globbing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from trainer.data.stream import HostBatch
from trainer.errors import UserError
from trainer.targets import resolve


class GrainSource:
    """A source over any grain data source or `grain.MapDataset` of records.

    Only the rows a process needs are read. The order is podlift's own, so it does not depend on
    the number of processes and a resume needs no iterator state.

    Args:
        records: random access to records: `len`, `[i]` and, where it has it, the batched
            `__getitems__` (as grain's ArrayRecordDataSource).
        parse: turns one record into a dict of arrays; the records are such dicts where None.
        num_threads: how many records are parsed at once.
    """

    def __init__(
        self,
        records: Any,
        parse: Callable[[Any], Mapping[str, Any]] | None = None,
        num_threads: int = 8,
    ) -> None:
        self._records = records
        self._parse = parse
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="podlift-read")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, indices: np.ndarray, /) -> HostBatch:
        flat = [int(i) for i in np.ravel(indices)]
        if hasattr(self._records, "__getitems__"):
            records: Sequence[Any] = self._records.__getitems__(flat)
            examples = list(self._pool.map(self._parse, records)) if self._parse else list(records)
        else:
            examples = list(self._pool.map(self._read, flat))
        return {
            name: np.stack([example[name] for example in examples]).reshape(
                *np.shape(indices), *np.shape(examples[0][name])
            )
            for name in examples[0]
        }

    def _read(self, index: int) -> Mapping[str, Any]:
        record = self._records[index]
        return self._parse(record) if self._parse else record


def array_records(train: str, parse: str, eval: str | None = None) -> dict[str, Any]:
    """ArrayRecord files by glob pattern (`/data/train-*.array_record`).

    Args:
        train: pattern of the training files.
        parse: `"package.module:function"` that turns the bytes of a record into a dict of arrays.
        eval: pattern of the held-out files, if any.

    Raises:
        UserError: grain is not installed, or a pattern matches nothing.
    """
    try:
        from grain.sources import ArrayRecordDataSource
    except ImportError as error:
        raise UserError("grain is not installed", 'pip install "podlift[data]"') from error
    function = resolve(parse, "config.data.parse")

    def open_all(key: str, pattern: str) -> GrainSource:
        paths = sorted(globbing.glob(pattern))
        if not paths:
            raise UserError(f"config.data.{key}={pattern!r} matches no file")
        return GrainSource(ArrayRecordDataSource(paths), function)

    return {
        "train": open_all("train", train),
        **({"eval": open_all("eval", eval)} if eval else {}),
    }
