"""The charts of a report: fewer points, axes, numbers, colours."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.report import assets, chart, scale
from launcher.report.thin import thin

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(
    st.lists(st.one_of(st.none(), finite), min_size=1, max_size=400),
    st.integers(1, 20),
    st.integers(1, 1000),
)
def test_thinning_keeps_extremes_ends_and_gaps(values, buckets, every):
    points = [(every * index, value) for index, value in enumerate(values)]
    kept = thin(points, buckets)
    assert len(kept) <= 5 * buckets
    steps = [step for step, _ in kept]
    assert steps == sorted(set(steps))
    assert set(kept) <= set(points)
    numbers, left = ([v for _, v in group if v is not None] for group in (points, kept))
    assert (None in values) == (None in (v for _, v in kept))
    if numbers:
        assert (min(numbers), max(numbers)) == (min(left), max(left))
        assert (numbers[0], numbers[-1]) == (left[0], left[-1])


def test_one_spike_among_many_points_is_drawn():
    points = [(step, 9.0 if step == 54_321 else 1.0) for step in range(100_000)]
    assert (54_321, 9.0) in thin(points)
    picture, hover = chart.draw("train/loss", [chart.Line("a", 0, points)], 99_999, log=False)
    assert len(picture) < 60_000
    assert max(hover["lines"][0][1]) == 9.0


@given(st.lists(finite, min_size=1, max_size=5), st.booleans())
def test_ticks_are_on_the_axis_and_differ(values, log):
    axis = scale.values_scale(values, log=log)
    drawable = [value for value in values if abs(value) <= scale.LARGEST]
    assert math.isfinite(axis.low)
    assert axis.low < axis.high < math.inf
    assert 1 <= len(axis.ticks) <= 12
    for value, _ in axis.ticks:
        assert -1e-9 <= axis.place(value) <= 1 + 1e-9
    labels = [label for _, label in axis.ticks]
    assert len(set(labels)) == len(labels)
    for value in drawable:
        if not axis.is_log:
            assert -1e-9 <= axis.place(value) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0.0, 1.0], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0.96, 0.99], False, ["0.96", "0.97", "0.98", "0.99"]),
        ([3.0, 3.0], False, ["2.7", "2.8", "2.9", "3.0", "3.1", "3.2"]),
        ([0.0, 23_000.0], False, ["0", "5k", "10k", "15k", "20k"]),
        ([1e-5, 3e-5], False, ["1.0e-5", "1.5e-5", "2.0e-5", "2.5e-5", "3.0e-5"]),
        ([], False, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([1e-3, 10.0], True, ["0.001", "0.01", "0.1", "1", "10"]),
        ([0.3, 4.0], True, ["0.5", "1", "2"]),
        ([-1.0, 0.0], True, ["-1.0", "-0.8", "-0.6", "-0.4", "-0.2", "0.0"]),
    ],
)
def test_labels(values, log, labels):
    found = [label for _, label in scale.values_scale(values, log=log).ticks]
    assert found == labels


def test_numbers_and_steps():
    expected = {
        0.0: "0",
        1.0: "1",
        0.99167: "0.9917",
        19751.8: "19,752",
        2.9e-5: "2.9e-5",
        1e30: "1e30",
    }
    assert {value: scale.number(value) for value in expected} == expected
    assert [label for _, label in scale.steps_scale(5).ticks] == ["0", "1", "2", "3", "4", "5"]
    assert [label for _, label in scale.steps_scale(0).ticks] == ["0", "1"]


@pytest.mark.parametrize(
    ("colours", "card"), [(assets.LIGHT, assets.LIGHT_CARD), (assets.DARK, assets.DARK_CARD)]
)
def test_lines_stand_out_and_differ_without_colour(colours, card):
    def luminance(colour):  # WCAG 2.2
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert len(colours) == chart.COLOURS
    assert all(contrast(colour, card) >= 3 for colour in colours)
    assert len({chart.swatch(number) for number in range(42)}) == 42
