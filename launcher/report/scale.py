"""Axes with their ticks and labels, and the format of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Larger values would overflow in the arithmetic of axes; they are drawn as gaps.
LARGEST = 1e250
_SMALLEST = 1e-250
_SUFFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: the value at its start.
        high: the value at its end, above `low`.
        is_log: whether it is logarithmic; then `low` is positive.
        ticks: values on the axis with their labels.
    """

    low: float
    high: float
    is_log: bool
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float) -> float:
        """The position of a value: 0 at the start, 1 at the end."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


def steps_scale(last: int) -> Scale:
    """From 0 to the last step, with ticks at whole steps."""
    high = float(max(last, 1))
    step = max(1.0, _nice(high / 6))
    return Scale(0.0, high, False, _labelled(_multiples(0.0, high, step), step))


def values_scale(values: Iterable[float], *, log: bool = False) -> Scale:
    """Covers all values with a margin; logarithmic if `log` is set and any value is positive."""
    drawable = [value for value in values if abs(value) <= LARGEST]
    positive = [value for value in drawable if value > _SMALLEST]
    if log and positive:
        return _log_scale(min(positive), max(positive))
    low, high = min(drawable, default=0.0), max(drawable, default=1.0)
    span, size = high - low, max(abs(low), abs(high))
    if span > max(1e-6 * size, _SMALLEST):
        room = 0.05 * span
    else:  # equal up to rounding
        room = 0.1 * size if size > _SMALLEST else 1.0
    # An axis of non-negative values does not start below zero.
    low, high = low - room if low < 0 or low > room else 0.0, high + room
    step = _nice((high - low) / 6)
    return Scale(low, high, False, _labelled(_multiples(low, high, step), step))


def _log_scale(low: float, high: float) -> Scale:
    room = max(0.03 * (math.log10(high) - math.log10(low)), 0.05)
    low, high = low / 10**room, high * 10**room
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = -(-(last - first + 1) // 7) or 1
    ticks = [10.0**power for power in range(first, last + 1, every)]
    if len(ticks) < 3:  # little more than a decade
        powers = range(first - 1, last + 1)
        ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    if sum(low <= tick <= high for tick in ticks) < 2:  # a small part of a decade
        step = _nice((high - low) / 6)
        return Scale(low, high, True, _labelled(_multiples(low, high, step), step))
    return Scale(low, high, True, [(t, number(t)) for t in ticks if low <= t <= high])


def _nice(step: float) -> float:
    """1, 2 or 5 times a power of ten, at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((digit * power for digit in (1, 2, 5) if digit * power >= step), 10 * power)


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _labelled(ticks: Sequence[float], step: float) -> list[tuple[float, str]]:
    """Labels for ticks `step` apart, all with the same number of decimals."""
    largest = max(map(abs, ticks), default=0.0)
    unit, suffix = 1.0, ""
    if 1e4 <= largest < 1e12:
        unit, suffix = next(pair for pair in _SUFFIXES if largest >= pair[0])
    elif largest >= 1e12 or largest < 1e-3:
        digits = math.floor(math.log10(largest or 1)) - math.floor(math.log10(step) + 1e-9)
        return [(tick, _scientific(tick, max(0, digits))) for tick in ticks]
    decimals = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    zero = "0" if suffix else f"{0:.{decimals}f}"
    return [(t, f"{t / unit:,.{decimals}f}{suffix}" if t else zero) for t in ticks]


def _scientific(value: float, decimals: int) -> str:
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.{decimals}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def number(value: float) -> str:
    """A value with four significant digits: 19,752, 0.9917, 2.9e-5."""
    size = abs(value)
    if size and not 1e-4 <= size < 1e12:
        text = f"{value:.3e}"
        mantissa, _, exponent = text.partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
