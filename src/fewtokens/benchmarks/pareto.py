"""Accuracy against cost and against speed, from the reports of runs: which method gives most for what.

    python -m fewtokens.benchmarks.pareto outputs/sweeps/<time> ... --write docs/results/off_the_shelf

Reads every report.json below the folders given (and the run.json and config.yaml beside it), runs nothing, and writes
a csv of the points, a plot, and tables: the points, and all methods at equal multiply-adds and at equal speed.
"""

import argparse
import csv
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fewtokens.errors import FewtokensError

DENSE = "dense"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the dense model's multiply-adds
SPEEDS = (1.1, 1.2, 1.3, 1.5, 1.75)


@dataclass(frozen=True)
class Point:
    """One run: a method, how it was set, and what its report says.

    Args:
        method: Class of the tokenizer, with settings that are words; "dense" for the plain transformer.
        setting: The other overrides of the tokenizer on the run's command line.
        accuracy: The metric, a share.
        gmacs: Multiply-adds per image.
        share: The same as a share of the dense model's.
        speedup: Against the dense model, measured; None where the run did not time itself.
        images_per_s: Measured; None likewise.
        commit: Of the code.
        device: That it ran on.
    """

    method: str
    setting: str
    accuracy: float
    gmacs: float
    share: float
    speedup: float | None
    images_per_s: float | None
    commit: str | None
    device: str | None


def read_points(folders: Iterable[Path], metric: str) -> tuple[list[Point], list[str]]:
    """The points of all reports below the folders, and why others are none.

    Raises:
        FewtokensError: There is no report at all, or a file is no report.
    """
    files = sorted({path for folder in folders for path in folder.rglob("report.json")})
    if not files:
        raise FewtokensError(
            "Points come from the reports of runs",
            expected="report.json in the folders given or below",
            got="none",
            fix="run python eval.py -m checkpoint=<run> tokenizer=tome tokenizer.build.r=1,2,4 first",
        )
    points, left_out = [], []
    for path in files:
        report = _json(path)
        lacks = [name for name in (metric, "cost/gmacs", "cost/gmacs_dense") if name not in report]
        if lacks:
            left_out.append(f"{path}: without {', '.join(lacks)}")
        else:
            points.append(_point(path.parent, report, metric))
    return sorted(points, key=lambda point: (point.method != DENSE, point.method, -point.gmacs)), left_out


def _point(run: Path, report: dict[str, float], metric: str) -> Point:
    about = _json(run / "run.json") if (run / "run.json").is_file() else {}
    config = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else {}
    target = config.get("tokenizer", {}).get("build", {}).get("_target_", "unknown").rpartition(".")[2]
    overrides = [part.removeprefix("tokenizer.") for part in shlex.split(about.get("command", ""))
                 if part.startswith("tokenizer.")]  # fmt: skip
    # Words, such as true or inverse_transform, make another method; numbers, how far it goes.
    words = [part for part in overrides if re.fullmatch(r"build\.\w+=(?!all$|null$)[A-Za-z_]\w*", part)]
    named = ", ".join(part.removeprefix("build.") for part in words)
    return Point(
        DENSE if target == "Tokenizer" else f"{target} ({named})" if named else target,
        " ".join(part.removeprefix("build.") for part in overrides if part not in words),
        report[metric],
        report["cost/gmacs"],
        report["cost/gmacs"] / report["cost/gmacs_dense"],
        report.get("throughput/speedup"),
        report.get("throughput/images_per_s"),
        about.get("commit"),
        about.get("device"),
    )


def frontier(points: Sequence[Point], cost: Callable[[Point], float]) -> set[Point]:
    """The points that no other beats: none costs at most as much and is at least as accurate, one of both strictly."""
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


def matched(points: Sequence[Point], value: Callable[[Point], float | None], at: float) -> dict[str, float]:
    """Accuracy of every method where `value` is `at`, on straight lines between its points; none beyond them.

    The dense model is a point of every method: what it is when nothing is dropped.
    """
    dense = [point for point in points if point.method == DENSE]
    found = {}
    for method in dict.fromkeys(point.method for point in points if point.method != DENSE):
        own = [point for point in points if point.method == method] + dense
        known = sorted((x, point.accuracy) for point in own if (x := value(point)) is not None)
        for (low, first), (high, second) in pairwise(known):
            if low <= at <= high:
                found[method] = first if low == high else first + (second - first) * (at - low) / (high - low)
                break
    return found


def tables(points: Sequence[Point], metric: str) -> str:
    """All points, and the methods at equal cost and equal speed, as Markdown."""
    best, fastest = frontier(points, lambda p: p.gmacs), _fastest(points)
    lines = [
        f"| method | setting | {metric} | GMACs | of dense | speed-up | images/s | best at its cost | at its speed |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for p in points:
        speed = [f"{p.speedup:.2f}" if p.speedup else "-", f"{p.images_per_s:,.0f}" if p.images_per_s else "-"]
        marks = ["yes" if p in chosen else "" for chosen in (best, fastest)]
        cells = [p.method, p.setting, f"{p.accuracy:.2%}", f"{p.gmacs:.4f}", f"{p.share:.0%}", *speed, *marks]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "At equal multiply-adds (share of the dense model's):", ""]
    lines += _matched_table(points, lambda p: p.share, SHARES, "{:.0%}")
    if fastest:
        lines += ["", "At equal speed (measured speed-up over the dense model):", ""]
        lines += _matched_table(points, lambda p: p.speedup, SPEEDS, "{:g} x")
    return "\n".join(lines)


def plot(points: Sequence[Point], metric: str) -> Figure:
    """Accuracy over GMACs and, where it was measured, over the speed-up."""
    timed = [point for point in points if point.speedup is not None]
    panels: list[tuple[str, Callable[[Point], float], Sequence[Point]]] = [
        ("GMACs per image", lambda p: p.gmacs, points)
    ]
    if timed:
        panels.append(("measured speed-up", lambda p: p.speedup or 0.0, timed))
    figure = Figure(figsize=(6 * len(panels), 4.5), dpi=120, layout="constrained")
    for axis, (words, x, shown) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, method in enumerate(dict.fromkeys(point.method for point in shown)):
            own = sorted((x(p), 100 * p.accuracy) for p in shown if p.method == method)
            style = {"color": "black", "marker": "*", "ms": 11} if method == DENSE else {"color": f"C{number % 10}"}
            marker = {"marker": "osv^D<>pXP"[number % 10], "ms": 4.5, "lw": 1.2} | style
            axis.plot(*zip(*own, strict=True), label=method, **marker)
        axis.set(xlabel=words, ylabel=f"{metric} (%)")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure


def _fastest(points: Sequence[Point]) -> set[Point]:
    timed = [point for point in points if point.speedup is not None]
    return frontier(timed, lambda p: -(p.speedup or 0.0))


def _matched_table(
    points: Sequence[Point], value: Callable[[Point], float | None], levels: Sequence[float], form: str
) -> list[str]:
    found = [matched(points, value, level) for level in levels]
    methods = sorted(
        {method for row in found for method in row}, key=lambda m: -sum(m in row and row[m] for row in found)
    )
    lines = [f"| method | {' | '.join(form.format(level) for level in levels)} |", "|---" * (len(levels) + 1) + "|"]
    for method in methods:
        cells = [f"{row[method]:.2%}" if method in row else "-" for row in found]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise FewtokensError(
            "A report is a json object", expected="what train.py or eval.py wrote", got=path, fix="remove the file"
        )
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, write csv, png and md, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="with runs in them")
    parser.add_argument("--metric", default="test/top1", help="of the reports (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="path of the files without ending")
    parser.add_argument("--cost-only", action="store_true", help="leave out speed that was measured on a busy machine")
    parser.add_argument("--title", default="Accuracy against cost and speed")
    args = parser.parse_args(argv)
    try:
        points, left_out = read_points(args.folders, args.metric)
        if args.cost_only:
            points = [replace(point, speedup=None, images_per_s=None) for point in points]
        if not points:
            raise FewtokensError(
                "A point needs an accuracy and a cost",
                expected=f"{args.metric} and cost/gmacs in a report",
                got="; ".join(left_out),
                fix="evaluate with measure=default",
            )
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    text = tables(points, args.metric)
    print(text)
    for reason in left_out:
        print(f"Left out: {reason}", file=sys.stderr)
    if args.write is not None:
        _write(points, args.write, args.title, text, args.metric)
    return 0


def _write(points: Sequence[Point], path: Path, title: str, text: str, metric: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)
    FigureCanvasAgg(plot(points, metric)).print_png(path.with_suffix(".png"))
    devices = ", ".join(sorted({point.device for point in points if point.device}))
    notes = f"Written by `python -m fewtokens.benchmarks.pareto` from {path.stem}.csv's runs. Run on: {devices}."
    path.with_suffix(".md").write_text(f"# {title}\n\n{notes}\n\n![{title}]({path.stem}.png)\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
