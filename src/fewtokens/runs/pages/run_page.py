"""The page of a run: report.html in its directory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fewtokens.errors import FewtokensError
from fewtokens.runs import report
from fewtokens.runs.pages import page
from fewtokens.runs.pages.charts import LARGEST, Chart, Point, Series, chart
from fewtokens.runs.pages.record import MAX_METRICS, RunRecord, config_text, read_metrics, read_run, read_settings

FILE = "report.html"
LISTED = ("report.json", "metrics.csv", "config.yaml", "run.json", "confusion.csv", "cost_histogram.csv", "skipped.csv")
TITLES = {
    "loss": "Loss",
    "top1": "Accuracy",
    "top5": "Accuracy, top 5",
    "map": "Mean average precision",
    "lr": "Learning rate",
}
SHARES = ("top1", "top5", "map")  # metrics from 0 to 1, which are shown as percent
STAGES = {"val": ("validation", 0), "train": ("training", 1), "steps": ("training, single steps", 1)}  # words, color
CHOICES = ("tokenizer", "backbone", "data")  # what the subtitle names
MOST_NUMBERS = 500
# What is logged at the end of a run, and again if it is resumed.
OF_THE_END = ("test", "cost", "throughput", "init", "train/seconds", "train/epochs")


class Bar(NamedTuple):
    """A number of a headline as a bar: what it is of, its text, and its length as a share of the longest."""

    label: str
    text: str
    share: float


class Headline(NamedTuple):
    """One of the most important numbers of a run."""

    title: str
    value: str
    note: str = ""
    bars: tuple[Bar, ...] = ()


def write(run: Path) -> Path:
    """Write report.html from the other files of a run, and return its path.

    Args:
        run: Directory of the run, in any state.

    Raises:
        FewtokensError: The directory contains no run, or the file cannot be written.
    """
    record, path = read_run(run), run / FILE
    config, settings, problems = _read_config(run)
    if (run / "metrics.csv").is_file() and (run / "metrics.csv").stat().st_size > MAX_METRICS:
        problems.append(f"metrics.csv is larger than {MAX_METRICS:,} bytes. The curves show only its beginning.")
    budget, rows = page.Budget(), list(report.rows(record.numbers))
    pictures = [picture for file in page.picture_files(run) if (picture := page.embedded(file, path, budget))]
    page.write(
        path,
        "run.html",
        run=record,
        subtitle=subtitle(record, settings),
        headlines=headlines(record.numbers),
        rows=rows,
        compared=reduces(record.numbers) and any(dense for _, dense, _, _ in rows),
        blocks=tokens_by_block(record.numbers),
        charts=curves(read_metrics(run)),
        pictures=[picture for picture in pictures if not picture.of_training],
        training_pictures=[picture for picture in pictures if picture.of_training],
        numbers=[(name, f"{value:.10g}") for name, value in sorted(record.numbers.items())[:MOST_NUMBERS]],
        omitted=max(0, len(record.numbers) - MOST_NUMBERS),
        config=config,
        files=[name for name in LISTED if (run / name).is_file()],
        started=time(record.about.get("started", "")),
        ended=time(record.about.get("written", "")),
        problems=record.problems + problems,
    )
    return path


def subtitle(record: RunRecord, settings: Mapping[str, str]) -> str:
    """Return the choices that distinguish a run most, such as "token_learner · vit_mini · digits · seed 0"."""
    chosen = [record.choice(group, settings) for group in CHOICES]
    seed = [f"seed {record.about['seed']}"] if "seed" in record.about else []
    return " · ".join([name for name in chosen if name] + seed)


def headlines(numbers: dict[str, float]) -> list[Headline]:
    """Return the most important numbers of report.json: accuracy, multiply-adds, speed and its factor."""
    found, unit = [], report.unit(numbers)
    for name, title in (
        ("test/top1", "Test accuracy"),
        ("test/map", "Test mean average precision"),
        ("val/top1", "Validation accuracy"),
        ("val/map", "Validation mean average precision"),
    ):
        if name in numbers:
            top5 = numbers.get(name.replace("top1", "top5")) if name.endswith("top1") else None
            found.append(Headline(title, f"{numbers[name]:.2%}", "" if top5 is None else f"{top5:.2%} in the top 5"))
            break
    cost, dense = numbers.get("cost/gmacs"), numbers.get("cost/gmacs_dense")
    if cost is not None:
        bars = _bars(cost, dense, ".4f")
        note = f"{1 - cost / dense:.0%} fewer than with all tokens" if bars and dense else ""
        found.append(Headline(f"GMACs per {unit}", f"{cost:.4f}", note, bars))
    speed, slow = (numbers.get(f"throughput/images_per_s{end}") for end in ("", "_dense"))
    if speed is not None:
        bars = _bars(speed, slow, ",.0f") if reduces(numbers) else ()
        found.append(Headline(f"{unit}s/s".capitalize(), f"{speed:,.0f}", "", bars))
        if reduces(numbers) and "throughput/speedup" in numbers:
            found.append(Headline("Speed", f"{numbers['throughput/speedup']:.2f}", "times as fast as with all tokens"))
    if "train/seconds" in numbers and len(found) < 4:
        found.append(Headline("Training time", duration(numbers["train/seconds"])))
    return found


def reduces(numbers: Mapping[str, float]) -> bool:
    """Return whether a model costs something else than with all tokens, as far as this was counted."""
    return "cost/gmacs" not in numbers or numbers["cost/gmacs"] != numbers.get("cost/gmacs_dense")


def duration(seconds: float) -> str:
    """Return a time in words, such as "2 h 5 min" or "12 s"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def time(stamp: str) -> str:
    """Return a time of run.json as people write it."""
    return stamp.replace("T", " ").replace("+00:00", " UTC")


def tokens_by_block(numbers: Mapping[str, float]) -> list[Bar]:
    """Return the mean number of tokens after every block."""
    found = sorted((name, value) for name, value in numbers.items() if name.startswith("cost/tokens_block_"))
    longest = max((value for _, value in found), default=0.0) or 1.0
    return [Bar(name.rpartition("_")[2].lstrip("0") or "0", f"{value:.4g}", value / longest) for name, value in found]


def curves(metrics: Mapping[str, Sequence[Point]]) -> list[Chart]:
    """Return a chart for every metric that was logged more than once, with the curves of all stages."""
    found: dict[str, list[Series]] = {}
    for (metric, stage), points in logged(metrics).items():
        series = found.setdefault(metric, [])
        if all(points != other.points for other in series):  # parameter groups have the same learning rate
            words, color = STAGES.get(stage, (stage, len(series)))
            series.append(Series(words, points, color, stage == "steps"))
    return [chart(title(metric), found[metric], percent=metric in SHARES) for metric in ranked(found)]


def logged(metrics: Mapping[str, Sequence[Point]]) -> dict[tuple[str, str], list[Point]]:
    """Return the curves of a run by metric and stage: the loss of the validation is ("loss", "val")."""
    found = {}
    for name, values in metrics.items():
        points = [(x, y) for x, y in values if abs(x) <= LARGEST and abs(y) <= LARGEST]
        metric, stage = _metric_and_stage(name)
        if len({x for x, _ in points}) > 1 and stage not in OF_THE_END and name not in OF_THE_END:
            found[metric, stage] = points
    return found


def title(metric: str) -> str:
    """Return the words for a metric."""
    return TITLES.get(metric, metric)


def ranked(metrics: Iterable[str]) -> list[str]:
    """Return metrics in the order in which pages show them: those with a title first."""
    order = list(TITLES)
    return sorted(metrics, key=lambda metric: order.index(metric) if metric in order else len(order))


def _read_config(run: Path) -> tuple[str, dict[str, str], list[str]]:
    """Return the text of the config, its values, and a sentence if it cannot be read."""
    try:
        return config_text(run), read_settings(run), []
    except FewtokensError as error:
        return "", {}, [str(error)]


def _metric_and_stage(name: str) -> tuple[str, str]:
    """Split the name of a logged metric: "val/loss" is the loss of the validation."""
    if name.startswith("lr-"):
        return "lr", name.removeprefix("lr-").partition("/")[0]
    stage, _, metric = name.rpartition("/")
    if name == "train/loss":
        return metric, "steps"
    return metric.removesuffix("_epoch"), stage


def _bars(value: float, dense: float | None, form: str) -> tuple[Bar, ...]:
    if not dense or dense == value:
        return ()
    pairs, longest = (("all tokens", dense), ("with the tokenizer", value)), max(dense, value)
    return tuple(Bar(label, format(number, form), max(0.0, number / longest)) for label, number in pairs)
