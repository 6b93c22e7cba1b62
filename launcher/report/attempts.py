"""The attempts of a run, read from its logs: when, from which step to which, and how each ended.

A supervisor prints the reason for a restart to the terminal only, so the reason is read from the
last lines of the ranks' logs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launcher.processes.failure import is_lost_peer_error

# The end of the logs of ranks other than 0; the rest repeats rank 0.
_TAIL_BYTES = 65536

_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)", re.DOTALL)
_STEP = re.compile(r"step (\d+)/(\d+)  ")
_RESTORED = re.compile(r"restored step (\d+) from ")
_SAVED = re.compile(r"asked to stop: sav(?:ing|ed) at step (\d+)")
_DONE = (
    "finished: ",
    "stopped at step ",
    "stopped early ",
    "stopped at once",
    "nothing to do: ",
    "asked to stop",
)
_STACKS = re.compile(r"(Current thread|Thread) 0x[0-9a-f]+ \(most recent call first\)")


@dataclass(frozen=True)
class Attempt:
    """One attempt of a run.

    Attributes:
        number: counted from 1 over all starts in the folder.
        started: time of the first line of the log; empty if unknown.
        seconds: from the first line of the log to the last, or as the log states it, if that is
            longer; None if unknown.
        processes: number of logs.
        first_step: the step it resumed from.
        last_step: the last step in the logs; None if there is none.
        stop: the step to stop at, if the log names it.
        ending: why it ended; empty if the logs do not say.
        went_well: whether it finished, or stopped on request.
        warnings: warnings in the log of rank 0, with how often each appears.
    """

    number: int
    started: str
    seconds: float | None
    processes: int
    first_step: int
    last_step: int | None
    stop: int | None
    ending: str
    went_well: bool
    warnings: Mapping[str, int]


@dataclass
class _RankLog:
    """What matters in the log of a rank, collected line by line."""

    rank: int
    first: str = ""
    last: str = ""
    restored: int = 0
    step: int | None = None
    stop: int | None = None
    done: str = ""
    error: str = ""
    error_time: str = ""
    has_stacks: bool = False
    warnings: dict[str, int] = field(default_factory=dict)

    def add(self, line: str) -> None:
        stamped = _STAMP.match(line)
        if stamped is not None:
            self.last, line = stamped[1], stamped[2]
            self.first = self.first or self.last
        if match := _STEP.match(line):
            self.step, self.stop = int(match[1]), int(match[2])
        elif match := _RESTORED.match(line):
            self.restored = int(match[1])
        elif line.startswith(_DONE):
            self.done = line
            if match := _SAVED.match(line):
                self.step = int(match[1])
        elif line.startswith("error: "):
            self.error, self.error_time = line.removeprefix("error: "), self.last
        elif line.startswith("warning: "):
            text = line.removeprefix("warning: ")
            self.warnings[text] = self.warnings.get(text, 0) + 1
        elif _STACKS.match(line):
            self.has_stacks = True


def read_attempts(folder: Path, failure: Mapping[str, Any]) -> list[Attempt]:
    """All attempts that left a log, in order.

    Args:
        folder: the run's local folder.
        failure: the content of `failure.json`; empty if there is none.
    """
    found = []
    for number, place in _numbered(folder / "logs", r"attempt-(\d+)"):
        ranks = [
            _read_rank_log(path, rank)
            for rank, path in _numbered(place, r"rank-(\d+)\.log")
            if path.is_file()
        ]
        if ranks:
            error = str(failure.get("error") or "") if number == attempt_of(failure) else ""
            found.append(_attempt(number, ranks, error))
    return found


def attempt_of(failure: Mapping[str, Any]) -> int | None:
    """The number of the attempt that failed, from the name of its log if possible."""
    match = re.search(r"attempt-(\d+)", str(failure.get("log", "")))
    number = match[1] if match else str(failure.get("attempt"))
    return int(number) if re.fullmatch(r"[0-9]+", number) else None


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if match := re.fullmatch(pattern, path.name):
                found.append((int(match[1]), path))
    return sorted(found)


def _read_rank_log(path: Path, rank: int) -> _RankLog:
    log = _RankLog(rank)
    with contextlib.suppress(OSError), path.open("rb") as file:
        if rank > 0:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
        for line in file:
            log.add(line.decode("utf-8", "replace").rstrip("\r\n"))
    return log


def _attempt(number: int, ranks: list[_RankLog], error: str) -> Attempt:
    first = ranks[0]
    ending = error or _ending(ranks)
    return Attempt(
        number=number,
        started=first.first,
        seconds=_seconds(first.first, first.last, first.done),
        processes=len(ranks),
        first_step=first.restored,
        last_step=max((r.step for r in ranks if r.step is not None), default=None),
        stop=first.stop,
        ending=ending,
        went_well=not error and bool(ending) and ending in (rank.done for rank in ranks),
        warnings=first.warnings,
    )


def _ending(ranks: Iterable[_RankLog]) -> str:
    """How an attempt ended that `failure.json` does not describe."""
    ranks = list(ranks)
    failed = sorted((rank for rank in ranks if rank.error), key=lambda rank: rank.error_time)
    causes = [rank for rank in failed if not is_lost_peer_error(rank.error)]
    if causes:
        return causes[0].error
    done = next((rank.done for rank in ranks if rank.done), "")
    silent = [rank for rank in ranks if not rank.error and not rank.done]
    if silent and (failed or len(ranks) > len(silent)):
        who = ", ".join(str(rank.rank) for rank in silent[:5]) + (", ..." if silent[5:] else "")
        at = f" at step {silent[0].step}" if silent[0].step is not None else ""
        text = f"rank{'s' * (len(silent) > 1)} {who} ended without an error message{at}"
        return f"{text}; then {failed[0].error}" if failed else text
    if failed:
        return failed[0].error
    if not done and any(rank.has_stacks for rank in ranks):
        return "ended without an error message after the stacks of its threads: no progress?"
    return done


def _seconds(first: str, last: str, done: str) -> float | None:
    try:
        started, ended = (datetime.fromisoformat(text) for text in (first, last))
    except ValueError:
        return None
    stated = 0
    if match := re.match(r"finished: .* in (\d+):(\d\d):(\d\d)$", done):
        stated = 3600 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    return max(float(stated), (ended - started).total_seconds())
