"""One metric of several runs over their steps, as SVG."""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.report.scale import LARGEST, Scale, number, steps_scale, values_scale
from launcher.report.thin import Points, thin
from trainer.console import escape

# Colours and dashes rotate. Their counts have no common factor, so 42 lines differ. The style of
# the page defines the colours, for light and for dark.
COLOURS = 6
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "14 4", "5 2 1.5 2 1.5 2", "1.5 4.5")

WIDTH, HEIGHT = 560, 250
LEFT, TOP, RIGHT, BOTTOM = 56, 10, 548, 218

# Up to this many points are marked, to show where measurements are.
_MARKED = 40


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: name of the run.
        number: number of the run, which determines colour and dash.
        points: (step, value), with ascending steps; None is a gap.
    """

    name: str
    number: int
    points: Points


def swatch(number: int) -> str:
    """A sample of the line of a run, for legends."""
    return (
        '<svg class="swatch" viewBox="0 0 30 10" width="30" height="10" aria-hidden="true">'
        f'<path class="line c{number % COLOURS}" {_dash(number)}d="M0 5H30"/></svg>'
    )


def _dash(number: int) -> str:
    pattern = DASHES[number % len(DASHES)]
    return f'stroke-dasharray="{pattern}" ' if pattern else ""


def draw(tag: str, lines: Sequence[Line], last_step: int, *, log: bool) -> tuple[str, Any]:
    """Draws a metric.

    Args:
        tag: tag of the metric.
        lines: lines of the runs that have it.
        last_step: end of the axis of steps.
        log: whether the axis of values is logarithmic, if possible.

    Returns:
        An SVG element, and the values under the pointer, for JSON.
    """
    x = steps_scale(last_step)
    y = values_scale(
        (value for line in lines for _, value in line.points if value is not None), log=log
    )
    thinned = [_drawable(thin(line.points), y) for line in lines]
    paths = [
        _draw_line(line.number, points, x, y) for line, points in zip(lines, thinned, strict=True)
    ]
    words = html.escape(escape(_describe(tag, lines, y)))
    picture = (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f"<title>{html.escape(escape(tag))}</title><desc>{words}</desc>"
        f"{_draw_axes(x, y)}{''.join(paths)}"
        f'<path class="cursor" d="M0 {TOP}V{BOTTOM}" visibility="hidden"/></svg>'
    )
    hover = {
        "last": x.high,
        "lines": [
            [[step for step, _ in points], [_rounded(value) for _, value in points]]
            for points in thinned
        ],
    }
    return picture, hover


def _drawable(points: Points, y: Scale) -> list[tuple[int, float | None]]:
    """Turns values outside of the axis into gaps."""
    low = y.low if y.is_log else -LARGEST
    return [
        (step, None if value is None or not low <= value <= LARGEST else value)
        for step, value in points
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _draw_line(number: int, points: Points, x: Scale, y: Scale) -> str:
    colour = f"c{number % COLOURS}"
    pieces: list[str] = []
    dots: list[str] = []
    marked = sum(value is not None for _, value in points) <= _MARKED
    for is_gap, group in itertools.groupby(points, key=lambda point: point[1] is None):
        if is_gap:
            continue
        places = [
            (_across(x.place(step)), _up(y.place(value)))
            for step, value in group
            if value is not None
        ]
        if len(places) > 1:
            pieces.append("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places))
        if marked or len(places) == 1:
            dots += [f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>'
                     for a, b in places]  # fmt: skip
    path = f'<path class="line {colour}" {_dash(number)}d="{"".join(pieces)}"/>' if pieces else ""
    return path + "".join(dots)


def _draw_axes(x: Scale, y: Scale) -> str:
    drawn = []
    for value, label in y.ticks:
        at = f"{_up(y.place(value)):.1f}"
        drawn.append(f'<path class="grid" d="M{LEFT} {at}H{RIGHT}"/>')
        drawn.append(f'<text class="y" x="{LEFT - 7}" y="{at}" dy="0.33em">{label}</text>')
    for value, label in x.ticks:
        at = f"{_across(x.place(value)):.1f}"
        drawn.append(f'<path class="tick" d="M{at} {BOTTOM}v4"/>')
        drawn.append(f'<text class="x" x="{at}" y="{BOTTOM + 17}">{label}</text>')
    drawn.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    return "".join(drawn)


def _across(place: float) -> float:
    return LEFT + place * (RIGHT - LEFT)


def _up(place: float) -> float:
    return BOTTOM - place * (BOTTOM - TOP)


def _describe(tag: str, lines: Sequence[Line], y: Scale) -> str:
    """The chart as text, for screen readers."""
    sentences = [f"{tag} by step{', logarithmic' if y.is_log else ''}."]
    for line in lines:
        finite = [(step, value) for step, value in line.points if value is not None]
        if not finite:
            sentences.append(f"{line.name}: no finite value.")
            continue
        (first, start), (last, end) = finite[0], finite[-1]
        low, high = (pick(value for _, value in finite) for pick in (min, max))
        sentences.append(
            f"{line.name}: {number(start)} at step {first:,}, {number(end)} at step {last:,}, "
            f"between {number(low)} and {number(high)}."
        )
    return " ".join(sentences)
