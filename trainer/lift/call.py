"""One call of the compiled step, which takes one step or several (`config.steps_per_call`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """The steps that one call takes.

    Attributes:
        before: steps taken before it.
        step: steps taken after it.
        is_first: the first call of this start, which compiles.
        is_last: the run stops after it.
    """

    before: int
    step: int
    is_first: bool = False
    is_last: bool = False

    @property
    def steps(self) -> int:
        """How many steps the call takes."""
        return self.step - self.before

    def reaches(self, every: int | None) -> bool:
        """Whether the call takes a step that is a multiple of `every`; never for None."""
        return every is not None and self.step // every > self.before // every


def calls(first: int, stop: int, per_call: int) -> Iterator[Call]:
    """The calls from step `first` to `stop`, of `per_call` steps; the last may be shorter."""
    for before in range(first, stop, per_call):
        step = min(before + per_call, stop)
        yield Call(before, step, is_first=before == first, is_last=step == stop)
