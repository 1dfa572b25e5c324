"""Compare runs side by side, as one HTML page.

    python -m fewtokens.benchmarks.compare outputs/digits/<time> outputs/digits/<time> ... --write compare.html

Reads the directories of runs of train.py and eval.py, or all runs in the folder of a sweep. Runs that differ in the
seed alone are one row: the mean, and the 95 % confidence interval of the mean. The page shows their numbers, the
settings that differ, accuracy against cost and speed, the curves, and the pictures. It needs no network.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from urllib.parse import quote

from fewtokens.analysis.evaluation import interval
from fewtokens.benchmarks import tradeoff
from fewtokens.benchmarks.tradeoff import Point, frontier
from fewtokens.errors import FewtokensError
from fewtokens.runs import report
from fewtokens.runs.pages import page, run_page
from fewtokens.runs.pages.charts import Chart, Series, chart
from fewtokens.runs.pages.page import Picture
from fewtokens.runs.pages.record import RunRecord, is_run, read_metrics, read_run, read_settings

FREE = ("seed", "name", "paths")  # settings in which the runs of one row may differ
# The keys of `data` that name the data set, with its classes and parts.
DATA_SET = ("_target_", "root", "parts", "classes", "num_classes", "multilabel", "video_frames", "copies", "split_seed")
WHERE = ("commit", "device", "measured_on")  # entries of run.json that are the same within a row
MOST_DIFFERENCES = 200


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone.

    Args:
        runs: The runs, at least one, by seed.
        settings: The config of the first.
        number: Its place, which determines its color and its letter.
        label: Its method and setting.
    """

    runs: list[RunRecord]
    settings: dict[str, str]
    number: int = 0
    label: str = ""

    @property
    def first(self) -> RunRecord:
        """Return the first run, which stands for all where one is shown."""
        return self.runs[0]

    @property
    def letter(self) -> str:
        """Return what marks it in plots: A to Z, then A1, B1 ..."""
        return chr(ord("A") + self.number % 26) + (str(self.number // 26) if self.number >= 26 else "")

    @property
    def data_set(self) -> tuple[str, ...]:
        """Return what must be the same for a comparison of accuracies to mean something."""
        named = [key for key in self.settings if key.startswith("data.") and key.split(".")[1] in DATA_SET]
        return tuple(f"{key}={self.settings.get(key)}" for key in [*sorted(named), "trainer.limit_test_batches"])

    @property
    def data_name(self) -> str:
        """Return the name of the data set."""
        return self.first.choice("data", self.settings) or "unknown data"

    def values(self, name: str) -> list[float]:
        """Return a number of all runs, or none if a run does not have it."""
        found = [run.numbers[name] for run in self.runs if name in run.numbers]
        return found if len(found) == len(self.runs) else []

    def text(self, name: str, form: str) -> str:
        """Return the mean of a number, with the 95 % confidence interval if there are several seeds."""
        values = self.values(name)
        half = interval(values)
        return (f"{mean(values):{form}}" + (f" ± {half:{form}}" if half else "")) if values else ""

    def point(self, metric: str) -> Point | None:
        """Return the means of accuracy, cost and speed, or None if a run did not measure them."""
        if any(tradeoff.missing_numbers(run, metric) for run in self.runs):
            return None
        points = [tradeoff.point_of(run, self.settings, metric) for run in self.runs]
        speeds = self.values("throughput/speedup"), self.values("throughput/images_per_s")
        speedup, images_per_s = (mean(values) if values else None for values in speeds)
        return replace(
            points[0],
            accuracy=mean(point.accuracy for point in points),
            gmacs=mean(point.gmacs for point in points),
            share=mean(point.share for point in points),
            speedup=speedup,
            images_per_s=images_per_s,
        )


class Difference(NamedTuple):
    """A setting that is not the same in all rows: its key, and of every row its value and whether it is unusual."""

    key: str
    cells: list[tuple[str, bool]]


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


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Return the run directories, each once: the paths, or the runs below a folder that is no run itself.

    Raises:
        FewtokensError: A path is no run and contains none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        inside = [path] if is_run(path) else sorted({file.parent for file in path.rglob("run.json")})
        for run in inside:
            found.setdefault(run.resolve(), run)
        if not inside:
            read_run(path)  # raises the error
    return list(found.values())


def read_rows(paths: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """Read runs, and join those that differ in the seed alone.

    Returns:
        The rows in the order of their first runs, and a sentence for each problem.
    """
    problems: list[str] = []
    alike: dict[Any, list[Row]] = {}
    for path in paths:
        run = read_run(path)
        problems += run.problems
        try:
            settings = read_settings(path)
        except FewtokensError as error:
            settings = {}
            problems.append(str(error))
        key = _key(run, settings) if settings and "seed" in run.about else path
        alike.setdefault(key, []).append(Row([run], settings))
    joined = [row for same in alike.values() for row in _join(same)]
    labels = [" ".join(tradeoff.method_and_setting(row.first, row.settings)).strip() for row in joined]
    counts = Counter(labels)
    return [
        replace(row, number=number, label=label if counts[label] == 1 else f"{label} ({row.first.path.name})")
        for number, (row, label) in enumerate(zip(joined, labels, strict=True))
    ], problems


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Return the settings that are not the same in all rows, and what else their numbers may depend on."""
    columns = [{**_compared(row.settings), **_origin(row.first)} for row in rows]
    found = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "not set") for column in columns]
        counts = Counter(values)
        if len(counts) > 1:
            (usual, count), (_, next_count) = counts.most_common(2)
            found.append(Difference(key, [(value, count > next_count and value != usual) for value in values]))
    return found


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


def by_data_set(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of every data set."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.data_set, []).append(row)
    return list(found.values())


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


def _key(run: RunRecord, settings: dict[str, str]) -> tuple:
    return run.status, *sorted({**_compared(settings), **_origin(run, checkpoint=False)}.items())


def _join(same: Sequence[Row]) -> list[Row]:
    """Return one row for runs that differ in the seed. Runs with one seed, as of two checkpoints, are no sample."""
    seeds = [row.first.about.get("seed", "") for row in same]
    if len(set(seeds)) < len(seeds):
        return list(same)
    ordered = sorted(same, key=lambda row: (len(row.first.about.get("seed", "")), row.first.about.get("seed", "")))
    return [Row([row.first for row in ordered], ordered[0].settings)]


def _compared(settings: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key.partition(".")[0] not in FREE}


def _origin(run: RunRecord, checkpoint: bool = True) -> dict[str, str]:
    """Return what the numbers of a run may depend on besides the config."""
    found = {"kind of run": run.kind} | {key: run.about[key] for key in WHERE if key in run.about}
    found |= {f"version of {name}": version for name, version in run.versions.items()}
    given = dict(part.split("=", 1) for part in tradeoff.overrides(run) if "=" in part)
    return found | ({"checkpoint": given["checkpoint"]} if checkpoint and "checkpoint" in given else {})


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
