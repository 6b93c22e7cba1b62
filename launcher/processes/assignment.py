"""What a launcher passes to a worker, and what the worker passes back.

A worker inherits three open files: its assignment (JSON), its progress page, and a pipe for its
outcome (one line of JSON). Nothing is pickled, and none of the files has a name on disk.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import BinaryIO

from launcher import exit_codes


@dataclass(frozen=True)
class Assignment:
    """One worker's part in one attempt.

    Attributes:
        rank: jax's process id.
        num_processes: number of processes in the job.
        coordinator: `HOST:PORT` of jax's coordinator; None for a job of one process.
        address: the address of this machine that the other ranks reach; CPU collectives listen
            there.
        local_device_ids: indices into the visible accelerators; None for all of them.
        start_timeout_secs: seconds that jax waits for its peers at the start.
        shutdown_timeout_secs: seconds that jax waits for its peers at the end.
        workdir: the run's folder.
        resumes: whether it held a run when the launcher started.
        local_dir: parent of the run's local folder, if the workdir is remote; None for the default.
        config: the resolved config, as `trainer.config.config_json.config_to_json` writes it.
        profile: the steps to trace, as `START:STEPS`; None for none.
        attempt: its number, from 1 over the life of the workdir.
        parent: process id of the launcher; the worker ends when it is gone.
        smoke: whether this is a smoke test.
    """

    rank: int
    num_processes: int
    coordinator: str | None
    address: str
    local_device_ids: tuple[int, ...] | None
    start_timeout_secs: int
    shutdown_timeout_secs: int
    workdir: str
    resumes: bool
    local_dir: str | None
    config: str
    profile: str | None
    attempt: int
    parent: int
    smoke: bool

    def write(self, file: BinaryIO) -> None:
        """Writes the assignment into an empty file and rewinds it."""
        file.write(json.dumps(asdict(self)).encode())
        file.flush()
        file.seek(0)

    @classmethod
    def read(cls, descriptor: int) -> Assignment:
        """Reads the assignment from an inherited descriptor, and closes it."""
        with os.fdopen(descriptor, "rb") as file:
            values = json.load(file)
        ids = values.pop("local_device_ids")
        return cls(**values, local_device_ids=None if ids is None else tuple(ids))


@dataclass(frozen=True)
class Outcome:
    """How a worker ended.

    Attributes:
        exit_code: one of `launcher.exit_codes`.
        message: for the user; empty after success.
        trace: the traceback, where the program raised.
        step: the step at which it ended, if known.
        lost_peer: whether this looks like a consequence of another process's end.
        failed: whether it is a failure although its exit code asks for another start.
    """

    exit_code: int
    message: str = ""
    trace: str = ""
    step: int | None = None
    lost_peer: bool = False
    failed: bool = False

    @property
    def is_failure(self) -> bool:
        """Whether it neither finished nor stopped on request."""
        return self.failed or self.exit_code not in (exit_codes.DONE, exit_codes.RETRY)

    def to_line(self) -> bytes:
        """One line of JSON of bounded length; the log holds the full text."""
        values = {**asdict(self), "message": _shorten(self.message), "trace": _shorten(self.trace)}
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Outcome:
        """The inverse of `to_line`."""
        return cls(**json.loads(line))


def _shorten(text: str, limit: int = 20_000) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... {len(text) - limit} characters ...\n{text[-limit // 2 :]}"
