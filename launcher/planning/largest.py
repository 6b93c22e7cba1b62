"""The largest batch that fits, in few compilations: memory is nearly a straight line in it."""

from __future__ import annotations

from collections.abc import Callable

# How close the answer comes: a 32nd of it.
_PARTS = 32


def largest_batch(
    needed: Callable[[int], int], available: int, start: int, most: int | None = None
) -> int:
    """The largest batch of a device whose program fits; 0 if not even one example does.

    The answer was compiled, and so was one that is at most 1/32 larger and does not fit. Where to
    look next is where the line through the two largest that fit ends, or in the middle.

    Args:
        needed: bytes for a batch, from a compilation.
        available: bytes of a device.
        start: where to look first.
        most: there is no use for more.
    """
    fits: list[tuple[int, int]] = []  # batches and their bytes, ascending
    beyond = None if most is None else most + 1
    high = beyond
    batch, on_line = max(1, min(start, most or start)), 0
    while True:
        size = needed(batch)
        if size <= available:
            fits.append((batch, size))
        else:
            high = batch
        low = fits[-1][0] if fits else 0
        step = max(1, low // _PARTS)
        margin = 1 if high == beyond else step  # `most` itself may be the answer
        if high is not None and high - low <= margin:
            return low
        guess = _where_it_ends(fits[-2:], available)
        if guess is not None and on_line < 2:
            on_line += 1
        else:  # the line has not led there at once
            unknown = high is None or (high == beyond and low)
            guess, on_line = (16 * low if unknown or high is None else (low + high) // 2), 0
        batch = max(low + step, guess)
        if high is not None:
            batch = min(batch, high - margin)


def _where_it_ends(two: list[tuple[int, int]], available: int) -> int | None:
    """The batch at which the line through two of them meets what is available."""
    if len(two) < 2 or two[1][1] <= two[0][1]:
        return None
    slope = (two[1][1] - two[0][1]) / (two[1][0] - two[0][0])
    return two[1][0] + int((available - two[1][1]) / slope)
