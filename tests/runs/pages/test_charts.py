"""Coordinates of charts."""

import re

import pytest

from fewtokens.runs.pages.charts import HEIGHT, WIDTH, Series, chart, thinned, ticks


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (-3.0, 7.0), (0.97, 0.981), (1e-5, 3e-5), (5e5, 4e6), (-1e15, 1e15), (1.0, 1.0 + 1e-8)],
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in found)


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0], [2.0, 2.0], [0.0, 1e-300], [-1e15, 1e15], [0.5, 0.7, 0.6], [1e-8, 2e-8], [1e12, 1e12 + 1.0]],
)
def test_every_point_is_inside_the_picture(values: list[float]) -> None:
    drawn = chart("Loss", [Series("a", [(float(i), y) for i, y in enumerate(values)])])
    places = [float(number) for number in re.findall(r"[-\d.]+", drawn.series[0].path)]
    assert all(0 <= x <= WIDTH for x in places[::2])
    assert all(0 <= y <= HEIGHT for y in places[1::2])
    texts = [text for _, text in drawn.y_ticks]
    assert len(set(texts)) == len(texts), "neighboring ticks differ"
    assert "Loss. a: " in drawn.summary


def test_error_bars_and_the_frontier_belong_to_dots() -> None:
    series = [Series("a", [(1.0, 0.5)], 0, errors=[0.1]), Series("b", [(2.0, 0.7)], 9)]
    drawn = chart("t", series, percent=True, dots=True, frontier=[(2.0, 0.7), (1.0, 0.5)])
    (ax, ay, half), (bx, by, none) = (one.dots[0] for one in drawn.series)
    assert ax < bx
    assert ay > by
    assert half > none == 0
    assert drawn.frontier == f"M{ax} {ay}L{bx} {by}"
    assert (drawn.series[1].color, drawn.series[1].dash) == (1, 1)
    assert all(text.endswith(" %") for _, text in drawn.y_ticks)


def test_runs_of_several_seeds_share_an_entry_of_the_legend() -> None:
    drawn = chart("t", [Series("a", [(0.0, y), (1.0, y)], 3) for y in (1.0, 2.0)])
    assert [one.label for one in drawn.legend] == ["a"]
    assert len(drawn.series) == 2


def test_thinning_keeps_peaks_and_order() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    points[5_001] = (5_001.0, 9.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert (5_001.0, 9.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:100], 100) == points[:100]
