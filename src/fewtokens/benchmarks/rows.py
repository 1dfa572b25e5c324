"""The rows of a comparison of runs: those that differ in the seed alone are one row."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from fewtokens.analysis.evaluation import interval
from fewtokens.benchmarks import tradeoff
from fewtokens.benchmarks.tradeoff import Point
from fewtokens.errors import FewtokensError
from fewtokens.runs.pages.record import RunRecord, is_run, read_run, read_settings

FREE = ("seed", "name", "paths")  # settings in which the runs of one row may differ
# The keys of `data` that name the data set, with its classes and parts.
DATA_SET = ("_target_", "root", "parts", "classes", "num_classes", "multilabel", "video_frames", "copies", "split_seed")
WHERE = ("commit", "device", "measured_on")  # entries of run.json that are the same within a row


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


def by_data_set(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows of every data set."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.data_set, []).append(row)
    return list(found.values())


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
