"""Compare methods by accuracy against cost and against speed, from the reports of runs.

    python -m fewtokens.benchmarks.pareto outputs/sweeps/<time> ... --write docs/results/off_the_shelf

Reads every report.json in the given folders and below, with the run.json and config.yaml beside it. Writes the points
(csv), a plot (png), and tables (md) of the points, and of all methods at equal multiply-adds and at equal speed. A csv
file that was written before can be given instead of folders, to write its plot and tables again.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from fewtokens.analysis.evaluation import proportion_interval
from fewtokens.analysis.pictures.drawing import write_png
from fewtokens.benchmarks.tradeoff import DENSE, Point, accuracy_at, frontier, read_points, write_points
from fewtokens.errors import FewtokensError

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the dense model's multiply-adds
SPEEDUPS = (1.1, 1.2, 1.3, 1.5, 1.75)
HEADINGS = ("GMACs", "of dense", "speed-up", "images/s", "best at its cost", "best at its speed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        points, skipped = read_points(args.paths, args.metric)
        if args.cost_only:
            points = [replace(point, speedup=None, images_per_s=None) for point in points]
        if not points:
            raise FewtokensError(
                f"No report has {args.metric} and cost/gmacs: {' '.join(skipped)} Evaluate with measure=default, or "
                "set --metric."
            )
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    text = tables(points, args.metric)
    print(text)
    for reason in skipped:
        print(f"Skipped: {reason}", file=sys.stderr)
    if args.write is not None:
        _write(points, args.write, args.title, text, args.metric)
    return 0


def tables(points: Sequence[Point], metric: str) -> str:
    """Return tables of all points, and of the methods at equal cost and at equal speed, as Markdown."""
    timed = [point for point in points if point.speedup is not None]
    best, fastest = frontier(points, lambda p: p.gmacs), frontier(timed, lambda p: -(p.speedup or 0.0))
    headings = ("method", "setting", metric, *HEADINGS)
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for p in points:
        speed = [f"{p.speedup:.2f}" if p.speedup else "-", f"{p.images_per_s:,.0f}" if p.images_per_s else "-"]
        marks = ["yes" if p in chosen else "" for chosen in (best, fastest)]
        cost = with_spread(p.gmacs, p.gmacs_std, 4)
        cells = [p.method, p.setting, _accuracy(p), cost, f"{p.share:.0%}", *speed, *marks]
        lines.append(f"| {' | '.join(cells)} |")
    if rows := _accuracy_table(points, lambda p: p.share, SHARES, "{:.0%}"):
        lines += ["", "At equal multiply-adds (share of the dense model's):", "", *rows]
    if rows := _accuracy_table(points, lambda p: p.speedup, SPEEDUPS, "{:g} x"):
        lines += ["", "At equal speed (measured speed-up over the dense model):", "", *rows]
    return "\n".join(lines)


def with_spread(value: float, std: float | None, digits: int) -> str:
    """Return a mean over images and, if they differ, its standard deviation."""
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std else "")


def plot(points: Sequence[Point], metric: str) -> Figure:
    """Return a plot of the accuracy over GMACs and, if it was measured, over the speed-up."""
    timed = [point for point in points if point.speedup is not None]
    panels: list[tuple[str, Callable[[Point], float], Sequence[Point]]] = [
        ("GMACs per image", lambda p: p.gmacs, points)
    ]
    if timed:
        panels.append(("measured speed-up", lambda p: p.speedup or 0.0, timed))
    figure = Figure(figsize=(6 * len(panels), 4.5), dpi=120, layout="constrained")
    for axis, (label, x, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, method in enumerate(dict.fromkeys(point.method for point in shown)):
            own = sorted((x(p), 100 * p.accuracy) for p in shown if p.method == method)
            style = {"color": "black", "marker": "*", "ms": 11} if method == DENSE else {"color": f"C{number % 10}"}
            marker = {"marker": "osv^D<>pXP"[number % 10], "ms": 4.5, "lw": 1.2} | style
            axis.plot(*zip(*own, strict=True), label=method, **marker)
        axis.set(xlabel=label, ylabel=f"{metric} (%)")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7, loc="lower right")
    return figure


def _accuracy(point: Point) -> str:
    if point.test_images is None:
        return f"{point.accuracy:.2%}"
    return f"{point.accuracy:.2%} ± {100 * proportion_interval(point.accuracy, int(point.test_images)):.2f}"


def _accuracy_table(
    points: Sequence[Point], value: Callable[[Point], float | None], levels: Sequence[float], form: str
) -> list[str]:
    """Return the rows of a table of the accuracy of every method at every level, none if no method reaches a level."""
    found = [accuracy_at(points, value, level) for level in levels]
    methods = {method for row in found for method in row}
    ranked = sorted(methods, key=lambda method: (-sum(row.get(method, 0.0) for row in found), method))
    lines = [f"| method | {' | '.join(form.format(level) for level in levels)} |", "|---" * (len(levels) + 1) + "|"]
    for method in ranked:
        cells = [f"{row[method]:.2%}" if method in row else "-" for row in found]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if ranked else []


def _write(points: Sequence[Point], path: Path, title: str, text: str, metric: str) -> None:
    write_points(points, path.with_suffix(".csv"))
    write_png(plot(points, metric), path.with_suffix(".png"))
    devices = ", ".join(sorted({point.measured_on for point in points if point.measured_on}))
    notes = f"Written by `python -m fewtokens.benchmarks.pareto` from the runs in {path.stem}.csv. Run on: {devices}."
    path.with_suffix(".md").write_text(f"# {title}\n\n{notes}\n\n![{title}]({path.stem}.png)\n\n{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "paths", nargs="+", type=Path, help="folders that contain runs, or a csv file written by --write"
    )
    parser.add_argument("--metric", default="test/top1", help="metric of the reports (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="path of the files to write, without an ending")
    parser.add_argument("--cost-only", action="store_true", help="ignore the measured speed")
    parser.add_argument("--title", default="Accuracy against cost and speed", help="title of the page and the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
