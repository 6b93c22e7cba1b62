"""What the logs of a run say of its attempts: when, from where to where, and how each ended.

Only the terminal was told why a supervisor started again, so an ending that it got over is read
from the last words of the ranks.
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

# Of the logs of ranks beside 0, whose lines say the same: only how they end.
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
        number: counted from 1 over the life of the folder.
        began: when, as its log has it; empty where unknown.
        seconds: from the first line of its log to the last, or what it says itself if that is
            more; None where unknown.
        processes: how many have left a log.
        first_step: that it went on from.
        last_step: that it told of; None if it took none.
        stop: the step it was to end at, where it told.
        ending: what ended it, in words; empty if nothing was said.
        went_well: whether it ended as it should, or as it was asked to.
        warnings: what else went wrong, each once, with how often.
    """

    number: int
    began: str
    seconds: float | None
    processes: int
    first_step: int
    last_step: int | None
    stop: int | None
    ending: str
    went_well: bool
    warnings: Mapping[str, int]


@dataclass
class _Words:
    """What matters in the log of a rank, line by line."""

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
    """All attempts that have left a log, the first one first.

    Args:
        folder: the run's local folder.
        failure: what `failure.json` holds, if there is one.
    """
    found = []
    for number, place in _numbered(folder / "logs", r"attempt-(\d+)"):
        words = [
            _words_of(path, rank)
            for rank, path in _numbered(place, r"rank-(\d+)\.log")
            if path.is_file()
        ]
        if words:
            told = str(failure.get("error") or "") if number == attempt_of(failure) else ""
            found.append(_attempt(number, words, told))
    return found


def attempt_of(failure: Mapping[str, Any]) -> int | None:
    """The number of the attempt that failed; its log's name says it best."""
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


def _words_of(path: Path, rank: int) -> _Words:
    words = _Words(rank)
    with contextlib.suppress(OSError), path.open("rb") as file:
        if rank > 0:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
        for line in file:
            words.add(line.decode("utf-8", "replace").rstrip("\r\n"))
    return words


def _attempt(number: int, ranks: list[_Words], told: str) -> Attempt:
    first = ranks[0]
    ending = told or _ending(ranks)
    return Attempt(
        number=number,
        began=first.first,
        seconds=_seconds(first.first, first.last, first.done),
        processes=len(ranks),
        first_step=first.restored,
        last_step=max((r.step for r in ranks if r.step is not None), default=None),
        stop=first.stop,
        ending=ending,
        went_well=not told and bool(ending) and ending in (rank.done for rank in ranks),
        warnings=first.warnings,
    )


def _ending(ranks: Iterable[_Words]) -> str:
    """How an attempt ended that has left no `failure.json`."""
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
        text = f"rank{'s' * (len(silent) > 1)} {who} ended without a word{at}"
        return f"{text}; then {failed[0].error}" if failed else text
    if failed:
        return failed[0].error
    if not done and any(rank.has_stacks for rank in ranks):
        return "ended without a word after the stacks of its threads: no progress?"
    return done


def _seconds(first: str, last: str, done: str) -> float | None:
    try:
        began, ended = (datetime.fromisoformat(text) for text in (first, last))
    except ValueError:
        return None
    told = 0
    if match := re.match(r"finished: .* in (\d+):(\d\d):(\d\d)$", done):
        told = 3600 * int(match[1]) + 60 * int(match[2]) + int(match[3])
    return max(float(told), (ended - began).total_seconds())
