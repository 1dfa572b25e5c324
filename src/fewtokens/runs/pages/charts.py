"""Charts as coordinates, which a template draws as SVG in the colors of the page: no plotting library, few bytes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
WIDTH, HEIGHT = 460, 270  # units of the SVG; about pixels, since a chart is as wide as a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
MOST_POINTS = 400  # of a line; more would not be seen
LARGEST = 1e15  # a diverged loss may be larger, and its chart would show nothing else
COLORS = 8  # of the style sheet: series-0 ... series-7; then they repeat with another dash


@dataclass(frozen=True)
class Series:
    """The points of one line.

    Args:
        label: What it is.
        points: (x, y), finite, sorted by x for a line.
        number: Number of its color and dash.
        faint: Whether it is drawn thin, behind the others.
        errors: Half the height of the error bar of every point, or none.
        mark: Short text beside its dots.
    """

    label: str
    points: Sequence[Point]
    number: int = 0
    faint: bool = False
    errors: Sequence[float] = ()
    mark: str = ""


@dataclass(frozen=True)
class Drawn:
    """A series in units of the SVG. `dots` are (x, y, half the height of the error bar)."""

    label: str
    color: int
    dash: int
    faint: bool
    path: str
    dots: list[tuple[float, float, float]]
    mark: str


@dataclass(frozen=True)
class Chart:
    """A chart, ready to be drawn.

    Args:
        title: Its title.
        x_label: Name of the horizontal axis.
        summary: A sentence for those who cannot see it.
        x_ticks: Position and text of the ticks of the horizontal axis.
        y_ticks: The same of the vertical axis.
        series: The lines and dots.
        frontier: Path of the Pareto frontier, or an empty text.
    """

    title: str
    x_label: str
    summary: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Drawn]
    frontier: str = ""
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def legend(self) -> list[Drawn]:
        """Return one series for each entry of the legend: runs of several seeds share one."""
        return list({(one.label, one.color, one.dash, one.faint): one for one in self.series}.values())


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "training step",
    percent: bool = False,
    dots: bool = False,
    frontier: Sequence[Point] = (),
) -> Chart:
    """Lay out a chart.

    Args:
        title: Its title.
        series: At least one, with at least one point; numbers of at most `LARGEST`.
        x_label: Name of the horizontal axis.
        percent: Whether the vertical axis shows shares as percent.
        dots: Draw dots, without lines between them.
        frontier: Points to connect by a dashed line.
    """
    points = [point for one in series for point in one.points]
    ends = [y + sign * error for one in series for (_, y), error in _with_errors(one) for sign in (-1, 1)]
    x_range = _range([x for x, _ in points], 0.06 if dots else 0.0)
    y_range = _range(ends, 0.06)
    place = _Place(x_range, y_range)
    drawn = [
        Drawn(
            one.label,
            one.number % COLORS,
            one.number // COLORS % 4,
            one.faint,
            "" if dots else place.path(thinned(one.points)),
            [place.dot(p, e) for p, e in _with_errors(one)] if dots or len(one.points) == 1 else [],
            one.mark,
        )
        for one in series
    ]
    summary = "; ".join(_describe(one, dots, percent) for one in series[:12])
    return Chart(
        title,
        x_label,
        f"{title}. {summary}.",
        [(place.x(v), _format(v, x_range, False)) for v in ticks(*x_range)],
        [(place.y(v), _format(v, y_range, percent)) for v in ticks(*y_range)],
        sorted(drawn, key=lambda one: not one.faint),
        place.path(sorted(frontier)) if len(frontier) > 1 else "",
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about `most` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` of the points: the lowest and the highest of every stretch, so that peaks stay."""
    if len(points) <= most:
        return list(points)
    count = most // 2
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    kept = []
    for start, end in pairwise(edges):
        stretch = range(start, end)
        pair = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(pair)]
    return kept


@dataclass(frozen=True)
class _Place:
    """The place of values in the drawing, from the ranges of both axes."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Iterable[Point]) -> str:
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)

    def dot(self, point: Point, error: float) -> tuple[float, float, float]:
        x, y = point
        return self.x(x), self.y(y), round(abs(self.y(y) - self.y(y + error)), 1)


def _with_errors(series: Series) -> list[tuple[Point, float]]:
    return list(zip(series.points, series.errors or [0.0] * len(series.points), strict=True))


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-12):  # a single value, or a constant
        half = max(0.1 * abs(high), 1e-9) if high else 1.0
        return low - half, high + half
    return low - margin * (high - low), high + margin * (high - low)


def _format(value: float, of: tuple[float, float], percent: bool) -> str:
    """Return a tick's text, with as many digits as neighboring ticks need to differ."""
    scale = 100.0 if percent else 1.0
    spread = (of[1] - of[0]) * scale / 5
    digits = max(0, min(6, -math.floor(math.log10(spread)) + (1 if spread < 1 else 0)))
    big, small = abs(value) >= 1e6, 0 < max(map(abs, of)) < 1e-3
    if not percent and (big or small):
        return f"{value:.3g}"
    text = f"{value * scale:,.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"{'0' if text in ('-0', '') else text}{' %' if percent else ''}"


def _describe(series: Series, dots: bool, percent: bool) -> str:
    def words(value: float) -> str:
        return f"{value:.2%}" if percent else f"{value:.4g}"

    if dots or len(series.points) == 1:
        return f"{series.label}: " + ", ".join(f"{words(y)} at {x:.4g}" for x, y in series.points[:12])
    return f"{series.label}: from {words(series.points[0][1])} to {words(series.points[-1][1])}"
