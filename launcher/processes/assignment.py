"""What a launcher hands to a worker, and what a worker hands back.

Three open files go with a worker: its assignment (JSON), the page of its progress, and a pipe for
its outcome (one line of JSON). Nothing is pickled and nothing has a name on disk.
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
        rank: of the worker, jax's process id.
        num_processes: in the job.
        coordinator: `HOST:PORT` where jax's coordinator is to listen; None for one process.
        address: of this machine towards the other ranks; CPU collectives listen there.
        local_device_ids: which of the visible accelerators it takes; None for all.
        heartbeat_timeout_secs: after which silence jax gives a peer up.
        start_timeout_secs: how long jax waits for its peers.
        shutdown_timeout_secs: how long it waits for them to leave.
        workdir: the run's folder.
        local_dir: where what needs a local folder goes if that is remote; None for the default.
        config: the resolved config, as `trainer.config.config_json.config_to_json` writes it.
        profile: which steps to trace, as `START:STEPS`; None: none.
        attempt: counted from 1 over the life of the workdir.
        parent: the launcher's process id; the worker dies with it.
        smoke: whether it only tries whether the run would work.
    """

    rank: int
    num_processes: int
    coordinator: str | None
    address: str
    local_device_ids: tuple[int, ...] | None
    heartbeat_timeout_secs: int
    start_timeout_secs: int
    shutdown_timeout_secs: int
    workdir: str
    local_dir: str | None
    config: str
    profile: str | None
    attempt: int
    parent: int
    smoke: bool

    def write(self, file: BinaryIO) -> None:
        """Puts the assignment into an empty file and rewinds it."""
        file.write(json.dumps(asdict(self)).encode())
        file.flush()
        file.seek(0)

    @classmethod
    def read(cls, descriptor: int) -> Assignment:
        """The inverse, in the worker."""
        with os.fdopen(descriptor, "rb") as file:
            values = json.load(file)
        ids = values.pop("local_device_ids")
        return cls(**values, local_device_ids=None if ids is None else tuple(ids))


@dataclass(frozen=True)
class Outcome:
    """How a process of the run ended.

    Attributes:
        exit_code: one of `launcher.exit_codes`.
        message: for a person; empty where all went well.
        trace: the traceback, where it is the program's own fault.
        step: at which it ended, if known.
        lost_peer: whether this looks like the consequence of another process's end.
    """

    exit_code: int
    message: str = ""
    trace: str = ""
    step: int | None = None
    lost_peer: bool = False

    @property
    def is_failure(self) -> bool:
        """Whether it ended neither by finishing nor by stopping when asked to."""
        return self.exit_code not in (exit_codes.DONE, exit_codes.RETRY)

    def to_line(self) -> bytes:
        """As one line of JSON, of bounded length; the whole story is in the log."""
        values = {**asdict(self), "message": _shorten(self.message), "trace": _shorten(self.trace)}
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Outcome:
        """The inverse."""
        return cls(**json.loads(line))


def _shorten(text: str, limit: int = 20_000) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... {len(text) - limit} characters ...\n{text[-limit // 2 :]}"
