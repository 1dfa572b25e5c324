"""Points of accuracy, cost and speed: read from the reports of runs, and compared between methods."""

import csv
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from fewtokens.errors import FewtokensError
from fewtokens.files import replace_file
from fewtokens.runs.pages.record import RunRecord, read_run, read_settings

DENSE = "dense"
NEAR = 0.01  # of the share of the multiply-adds, or of the speed-up


@dataclass(frozen=True)
class Point:
    """One run: its method, its settings, and the numbers of its report.

    Args:
        method: Class of the tokenizer, with those of its settings that are words; "dense" for the plain transformer.
        setting: The other overrides of the tokenizer on the command line of the run.
        accuracy: The metric, from 0 to 1.
        gmacs: 1e9 multiply-adds per image.
        share: The same divided by that of the dense model.
        speedup: Measured speed divided by that of the dense model; None if the run did not measure it.
        images_per_s: Measured speed; None if the run did not measure it.
        commit: Commit of the code, if known.
        measured_on: Device of the measures, if known.
        test_images: Number of test images, if known.
        gmacs_std: Standard deviation of the multiply-adds over images (1e9), if known.
    """

    method: str
    setting: str
    accuracy: float
    gmacs: float
    share: float
    speedup: float | None
    images_per_s: float | None
    commit: str | None
    measured_on: str | None
    test_images: int | float | None = None  # a csv file has floats
    gmacs_std: float | None = None


def read_points(paths: Iterable[Path], metric: str) -> tuple[list[Point], list[str]]:
    """Read all reports in the folders, and all csv files that `write_points` has written.

    Returns:
        The points, sorted by method and cost, and a sentence for each report that is skipped.

    Raises:
        FewtokensError: There is no report, or a config or a csv file cannot be read.
    """
    paths = list(paths)
    points = [point for path in paths if path.suffix == ".csv" for point in _read_csv(path)]
    files = sorted({file for path in paths for file in path.rglob("report.json")})
    if not files and not points:
        raise FewtokensError(
            f"There is no report.json in {', '.join(map(str, paths))} or below. Write some with python eval.py -m "
            "checkpoint=<run> tokenizer=tome tokenizer.build.r=1,2,4."
        )
    skipped = []
    for file in files:
        run = read_run(file.parent)
        missing = missing_numbers(run, metric)
        if missing:
            skipped.append(" ".join([f"{file} has no {', '.join(missing)}.", *run.problems]))
        else:
            points.append(point_of(run, read_settings(run.path), metric))
    return sorted(points, key=lambda point: (point.method != DENSE, point.method, -point.gmacs)), skipped


def write_points(points: Sequence[Point], path: Path) -> None:
    """Write the points as a csv file."""
    with replace_file(path, newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def frontier(points: Sequence[Point], cost: Callable[[Point], float]) -> set[Point]:
    """Return the points of the Pareto frontier: no other point is at least as good in cost and accuracy, and better."""
    return {
        point
        for point in points
        if not any(
            cost(other) <= cost(point)
            and other.accuracy >= point.accuracy
            and (cost(other), -other.accuracy) != (cost(point), -point.accuracy)
            for other in points
        )
    }


def accuracy_at(points: Sequence[Point], value: Callable[[Point], float | None], level: float) -> dict[str, float]:
    """Return the accuracy of every method where `value` equals `level`, interpolated linearly between its points.

    The dense model is a point of every method, which then drops nothing. Methods whose points do not enclose the level
    are not returned, unless the nearest of them is at most `NEAR` away and counts as it is: the cost that was aimed at
    is hardly ever met exactly.
    """
    dense = [point for point in points if point.method == DENSE]
    found = {}
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        own = [point for point in points if point.method == method] + dense
        known = sorted((x, point.accuracy) for point in own if (x := value(point)) is not None)
        if not known:
            continue
        at = min(max(level, known[0][0]), known[-1][0])
        if abs(at - level) > NEAR:
            continue
        for (low, first), (high, second) in pairwise([known[0], *known]):  # so that a single point is enough
            if low <= at <= high:
                found[method] = first if low == high else first + (second - first) * (at - low) / (high - low)
                break
    return found


def missing_numbers(run: RunRecord, metric: str) -> list[str]:
    """Return the numbers that a point needs and a run did not measure."""
    missing = [name for name in (metric, "cost/gmacs") if name not in run.numbers]
    return missing if run.numbers.get("cost/gmacs_dense", 0.0) > 0 else [*missing, "cost/gmacs_dense"]


def point_of(run: RunRecord, settings: Mapping[str, str], metric: str) -> Point:
    """Return the point of a run that has measured its accuracy and its cost.

    Args:
        run: The run.
        settings: Its config.
        metric: Name of the accuracy in report.json.
    """
    numbers = run.numbers
    return Point(
        *method_and_setting(run, settings),
        numbers[metric],
        numbers["cost/gmacs"],
        numbers["cost/gmacs"] / numbers["cost/gmacs_dense"],
        numbers.get("throughput/speedup"),
        numbers.get("throughput/images_per_s"),
        run.about.get("commit"),
        run.about.get("measured_on", run.about.get("device")),
        gmacs_std=numbers.get("cost/gmacs_std"),
    )


def method_and_setting(run: RunRecord, settings: Mapping[str, str]) -> tuple[str, str]:
    """Return the method of a run and its setting, see `Point`."""
    target = settings.get("tokenizer.build._target_", "unknown").rpartition(".")[2]
    given = [part.removeprefix("tokenizer.") for part in overrides(run) if part.startswith("tokenizer.")]
    # A word, such as true or inverse_transform, makes another method. A number says how many tokens it keeps.
    words = [part for part in given if re.fullmatch(r"build\.\w+=(?!all$|null$)[A-Za-z_]\w*", part)]
    named = ", ".join(part.removeprefix("build.") for part in words)
    setting = " ".join(part.removeprefix("build.") for part in given if part not in words)
    return DENSE if target == "Tokenizer" else f"{target} ({named})" if named else target, setting


def overrides(run: RunRecord) -> list[str]:
    """Return the arguments of the command that started a run."""
    try:
        return shlex.split(run.about.get("command", ""))
    except ValueError:  # a quote that is not closed, which no command line can contain
        return []


def _read_csv(path: Path) -> list[Point]:
    texts = ("method", "setting", "commit", "measured_on")
    points = []
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if "device" in row:  # the name of the column in old files
                    row["measured_on"] = row.pop("device")
                values: dict[str, Any] = {
                    name: text if name in texts else float(text) if text else None for name, text in row.items()
                }
                points.append(Point(**values))
    except (OSError, TypeError, ValueError) as error:
        raise FewtokensError(
            f"{path} must be a csv file written by --write, but reading it failed: {error}."
        ) from error
    return points
