"""Compare runs side by side, as one HTML page.

    python -m fewtokens.benchmarks.compare outputs/digits/<time> outputs/digits/<time> ... --write compare.html

Reads the directories of runs of train.py and eval.py, or all runs in the folder of a sweep. Runs that differ in the
seed alone are one row: the mean, and the 95 % confidence interval of the mean. The page shows their numbers, the
settings that differ, accuracy against cost and speed, the curves, and the pictures. It needs no network.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from urllib.parse import quote

from fewtokens.analysis.evaluation import interval
from fewtokens.benchmarks.rows import Row, by_data_set, differences, find_runs, read_rows
from fewtokens.benchmarks.tradeoff import Point, frontier
from fewtokens.errors import FewtokensError
from fewtokens.runs import report
from fewtokens.runs.pages import page, run_page
from fewtokens.runs.pages.charts import Chart, Series, chart
from fewtokens.runs.pages.page import Picture
from fewtokens.runs.pages.record import read_metrics

MOST_DIFFERENCES = 200


class Tradeoff(NamedTuple):
    """The plots of one data set: its name, accuracy over cost and over speed, and sentences about the best rows."""

    data_name: str
    charts: list[Chart]
    sentences: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        rows, problems = read_rows(find_runs(args.runs))
        write(rows, problems, args.metric, args.write)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"Problem: {problem}", file=sys.stderr)
    print(f"Page: {args.write}")
    return 0


def write(rows: Sequence[Row], problems: Sequence[str], metric: str, path: Path) -> None:
    """Write the page.

    Args:
        rows: At least one.
        problems: Sentences to show above everything else.
        metric: Name of the accuracy in report.json.
        path: The html file.

    Raises:
        FewtokensError: The file cannot be written.
    """
    tradeoffs = [of_data_set(same, metric) for same in by_data_set(rows)]
    different = differences(rows)
    page.write(
        path,
        "compare.html",
        rows=[_cells(row, metric, path) for row in rows],
        words=_words(metric),
        unit=units.pop() if len(units := {report.unit(row.first.numbers) for row in rows}) == 1 else "sample",
        data_sets=len(tradeoffs),
        runs=sum(len(row.runs) for row in rows),
        differences=different[:MOST_DIFFERENCES],
        omitted=max(0, len(different) - MOST_DIFFERENCES),
        tradeoffs=tradeoffs,
        charts=curves(rows),
        pictures=pictures(rows, path),
        problems=problems,
    )


def of_data_set(rows: Sequence[Row], metric: str) -> Tradeoff:
    """Return the plots of rows with a common data set. Speeds are compared only if one device measured all of them."""
    points = {row.number: point for row in rows if (point := row.point(metric)) is not None}
    measured = [row for row in rows if row.number in points]
    missing = [row.letter for row in rows if row.number not in points]
    sentences = [f"Not in the plots, without {metric} and cost: {', '.join(missing)}."] if missing else []
    if not measured:
        return Tradeoff(rows[0].data_name, [], sentences)
    unit = report.unit(measured[0].first.numbers)
    best = frontier(list(points.values()), lambda point: point.gmacs)
    charts = [_scatter(measured, points, metric, f"GMACs per {unit}", lambda p: p.gmacs, best)]
    sentences.insert(0, f"Best at its cost: {_letters(measured, points, best)}.")
    timed = [row for row in measured if points[row.number].images_per_s is not None]
    devices = {points[row.number].measured_on for row in timed}
    if len(devices) == 1:
        of_timed = [points[row.number] for row in timed]
        fastest = frontier(of_timed, lambda point: -(point.images_per_s or 0.0))
        charts.append(_scatter(timed, points, metric, f"{unit}s/s", lambda p: p.images_per_s or 0.0, fastest))
        sentences.insert(1, f"Best at its speed: {_letters(timed, points, fastest)}.")
    elif devices:
        sentences.append("Speeds are not compared, since they were measured on different devices.")
    return Tradeoff(rows[0].data_name, charts, sentences)


def curves(rows: Sequence[Row]) -> list[Chart]:
    """Return a chart for every metric of validation and training, with a curve for every run."""
    found: dict[tuple[str, str], list[Series]] = {}
    for row in rows:
        for run in row.runs:
            for key, points in run_page.logged(read_metrics(run.path)).items():
                if key[1] in ("val", "train"):
                    found.setdefault(key, []).append(Series(_name(row), points, row.number))
    charts = []
    for metric in run_page.ranked(dict.fromkeys(metric for metric, _ in found)):
        for stage in ("val", "train"):
            if (metric, stage) in found:
                title = f"{run_page.title(metric)}, {run_page.STAGES[stage][0]}"
                charts.append(chart(title, found[metric, stage], percent=metric in run_page.SHARES))
    return charts


def pictures(rows: Sequence[Row], path: Path) -> dict[str, list[tuple[str, Picture]]]:
    """Return the pictures of the first run of every row, by their heading: those of the same name are side by side."""
    found: dict[str, list[tuple[Row, Path]]] = {}
    groups = by_data_set(rows)
    for same in groups:
        data = f", {same[0].data_name}" if len(groups) > 1 else ""
        for row in same:
            for file in page.picture_files(row.first.path):
                if not page.EPOCH.match(file.stem):
                    found.setdefault(f"{file.name}{data}", []).append((row, file))
    budget = page.Budget()
    return {
        heading: [(_name(row), shown) for row, file in files if (shown := page.embedded(file, path, budget))]
        for heading, files in sorted(found.items(), key=lambda item: page.order(item[1][0][1]))
    }


def _cells(row: Row, metric: str, path: Path) -> dict[str, Any]:
    """Return what the table shows of a row."""
    share, point = metric.rpartition("/")[2] in run_page.SHARES, row.point(metric)
    links = [(str(run.path), _link(run.path / run_page.FILE, path)) for run in row.runs]
    seeds = [run.about["seed"] for run in row.runs if "seed" in run.about]
    seconds = row.values("train/seconds")
    return {
        "row": row,
        "links": links,
        "seeds": ", ".join(seeds),
        "accuracy": row.text(metric, ".2%" if share else ".4g"),
        "gmacs": row.text("cost/gmacs", ".4f"),
        "share": f"{point.share:.0%}" if point else "",
        "images_per_s": row.text("throughput/images_per_s", ",.0f"),
        "speedup": row.text("throughput/speedup", ".2f"),
        "params": f"{mean(params):,.0f}" if (params := row.values("cost/params")) else "",
        "training": run_page.duration(mean(seconds)) if seconds else "",
    }


def _scatter(
    rows: Sequence[Row],
    points: dict[int, Point],
    metric: str,
    x_label: str,
    x: Callable[[Point], float],
    best: set[Point],
) -> Chart:
    series = [
        Series(
            _name(row),
            [(x(points[row.number]), points[row.number].accuracy)],
            row.number,
            errors=[interval(row.values(metric)) or 0.0],
            mark=row.letter,
        )
        for row in rows
    ]
    share = metric.rpartition("/")[2] in run_page.SHARES
    line = [(x(point), point.accuracy) for point in best]
    return chart(
        f"{_words(metric)} over {x_label}",
        series,
        x_label,
        percent=share,
        dots=True,
        frontier=line,
    )


def _words(metric: str) -> str:
    return next((words for name, words, _ in report.TABLE if name == metric), metric)


def _name(row: Row) -> str:
    return f"{row.letter} {row.label}"


def _letters(rows: Sequence[Row], points: dict[int, Point], best: set[Point]) -> str:
    return ", ".join(row.letter for row in rows if points[row.number] in best)


def _link(target: Path, path: Path) -> str | None:
    return quote(os.path.relpath(target, path.parent)) if target.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders that contain some")
    parser.add_argument("--metric", default="test/top1", help="accuracy in report.json (default: %(default)s)")
    parser.add_argument("--write", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
