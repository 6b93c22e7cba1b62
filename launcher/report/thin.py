"""Reduces the points of a curve without a visible difference."""

from __future__ import annotations

from collections.abc import Sequence

# About one per pixel of a chart's width.
BUCKETS = 480

Points = Sequence[tuple[int, float | None]]


def thin(points: Points, buckets: int = BUCKETS) -> list[tuple[int, float | None]]:
    """Keeps the first, lowest, highest and last point of each bucket of steps, and a gap.

    A line through these points covers the same pixels as one through all points (M4; Jugel et al.,
    VLDB 2014), as long as a bucket is no wider than a pixel.

    Args:
        points: (step, value), with ascending steps; None is a gap.
        buckets: number of equal intervals of steps; each keeps at most 5 points.
    """
    if len(points) <= 5 * buckets:
        return list(points)
    first, last = points[0][0], points[-1][0]
    kept: list[tuple[int, float | None]] = []
    start = 0
    while start < len(points):
        bucket = _bucket_of(points[start][0], first, last, buckets)
        end = start
        while end < len(points) and _bucket_of(points[end][0], first, last, buckets) == bucket:
            end += 1
        kept.extend(points[index] for index in _extremes(points, start, end))
        start = end
    return kept


def _bucket_of(step: int, first: int, last: int, buckets: int) -> int:
    return (step - first) * buckets // (last - first + 1)


def _extremes(points: Points, start: int, end: int) -> list[int]:
    """Indices of the points in `points[start:end]` to keep."""
    finite = [(value, i) for i in range(start, end) if (value := points[i][1]) is not None]
    gap = next((i for i in range(start, end) if points[i][1] is None), None)
    kept = set() if gap is None else {gap}
    if finite:
        kept |= {finite[0][1], min(finite)[1], max(finite)[1], finite[-1][1]}
    return sorted(kept)
