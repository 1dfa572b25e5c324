"""The page of the suite: tables and plots of the rows, and nothing that is not in the json file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from fewtokens.analysis.evaluation import interval, proportion_interval
from fewtokens.analysis.pictures.drawing import write_png
from fewtokens.benchmarks import pareto, tradeoff
from fewtokens.benchmarks.suite.trials import FINE_TUNED, OFF_THE_SHELF, Trial, trial_of
from fewtokens.benchmarks.tradeoff import Point
from fewtokens.benchmarks.variants import DENSE, short_name
from fewtokens.files import replace_file, write_json

Content = dict[str, Any]
PLACED = ("token_learner", "token_learner_v11")


def write(content: Content, output: Path) -> None:
    """Write the json, md and png files.

    Args:
        content: What the json file holds: the protocol, `rows` and `speed`.
        output: Path of the files, without an ending.
    """
    write_json(content, output.with_name(f"{output.name}.json"))
    lines = [f"# {content['title']}", "", *_protocol(content)]
    for heading, section in (
        ("Off the shelf", _off_the_shelf),
        ("After the same training", _fine_tuned),
        ("Where TokenLearner stands", _placement),
    ):
        found, figure = section(content)
        if figure is not None:
            picture = f"{output.name}_{heading.split()[0].lower()}.png"
            write_png(figure, output.with_name(picture))
            found = [f"![{heading}]({picture})", "", *found]
        if found:
            lines += ["", f"## {heading}", "", *found]
    with replace_file(output.with_name(f"{output.name}.md")) as file:
        file.write("\n".join([*lines, ""]))


def points(content: Content) -> list[Point]:
    """Return the rows off the shelf as points of accuracy, cost and speed, the dense model first."""
    speed = {record["tokenizer"]: record for record in content["speed"]}
    found = []
    for row in content["rows"]:
        trial = trial_of(row)
        if trial.part == OFF_THE_SHELF:
            timed = speed.get(trial.method, {})
            found.append(
                Point(
                    tradeoff.DENSE if trial.option == DENSE else trial.option,
                    trial.setting,
                    row["accuracy"],
                    row["gmacs"],
                    row["share"],
                    timed.get("speedup_vs_dense"),
                    timed.get("images_per_s"),
                    row["commit"],
                    row["measured_on"],
                    content["test_images"],
                    row["gmacs_std"],
                )
            )
    return sorted(found, key=lambda point: (point.method != tradeoff.DENSE, point.method, -point.gmacs))


def accuracies(content: Content, part: str) -> dict[str, list[float]]:
    """Return the accuracies of every method of a part, one for each seed, in the order of the rows."""
    found: dict[str, list[float]] = {}
    for row in content["rows"]:
        if row["part"] == part:
            found.setdefault(row["method"], []).append(row["accuracy"])
    return found


def fine_tuned_rows(content: Content) -> dict[str, dict[str, Any]]:
    """Return a row of every trained method, the last of its seeds. They differ in accuracy, see `accuracies`."""
    return {row["method"]: row for row in content["rows"] if row["part"] == FINE_TUNED}


def half_width(values: Sequence[float], samples: int) -> float:
    """Return half the width of the interval of accuracies in percent: over seeds, or of one over its test samples."""
    half = interval(values)
    return 100 * (proportion_interval(values[0], samples) if half is None else half)


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, whose first row is its heading."""
    head, *body = rows
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]


def _protocol(content: Content) -> Iterator[str]:
    rows, speed = content["rows"], content["speed"]
    dates, commits = (sorted({row[key] for row in rows if row[key]}) for key in ("date", "commit"))
    yield "Written by `python -m fewtokens.benchmarks.suite` from the json file beside it, which has the command,"
    yield "the commit and the versions of every row."
    yield ""
    yield f"- Data: {content['data']}, all {content['test_images']:,} test images, {content['image_size']} pixels."
    yield f"- Model: `{content['backbone']}`. All methods start from the same weights (SHA-256 begins with"
    yield f"  {content['weights'][:16]})."
    yield "- GMACs: 1e9 multiply-adds of an image alone, ± the standard deviation over images where they differ."
    yield f"  Settings were chosen by the cost of {content['counted_images']} test images, not by accuracy."
    yield "- Intervals: 95 %, Wilson's for one accuracy, Student's over seeds. All rows have the same test images, so"
    yield "  that a difference between two rows is known better than either of them."
    if speed:
        first, rounds = speed[0], min(record["rounds"] for record in speed)
        yield f"- Speed: batch {first['batch']}, {first['precision']}, {first['device']}; all methods in turns in one"
        yield f"  process, at least {rounds} rounds."
    if rows:
        devices = ", ".join(sorted({str(row["measured_on"]) for row in rows}))
        days = " to ".join(sorted({dates[0][:10], dates[-1][:10]}))
        yield f"- Runs: {days}, on {devices},"
        yield f"  commits {', '.join(dict.fromkeys(commit[:8] for commit in commits))}."


def _off_the_shelf(content: Content) -> tuple[list[str], Figure | None]:
    found = points(content)
    if len(found) < 2:
        return [], None
    metric = content["metric"]
    return pareto.tables(found, metric).splitlines(), pareto.plot(found, metric)


def fine_tuned_table(content: Content) -> list[list[str]]:
    """Return the heading and a row for every trained method, the dense model first and then the best."""
    before, after = accuracies(content, OFF_THE_SHELF), accuracies(content, FINE_TUNED)
    rows = fine_tuned_rows(content)
    table = [["method", "setting", "GMACs", "of dense", "off the shelf", "trained", "gain", "seeds"]]
    for method in _ranked(after):
        trial, row = trial_of(rows[method]), rows[method]
        shelf, trained = before.get(method), mean(after[method])
        compared = ["-", "-"] if shelf is None else [f"{shelf[0]:.2%}", f"{100 * (trained - shelf[0]):+.2f}"]
        spread = f"{trained:.2%} ± {half_width(after[method], content['test_images']):.2f}"
        cost = pareto.with_spread(row["gmacs"], row["gmacs_std"], 3)
        cells = [short_name(trial.option), trial.setting, cost, f"{row['share']:.0%}", compared[0], spread, compared[1]]
        table.append([*cells, str(len(after[method]))])
    return table


def _ranked(after: dict[str, list[float]]) -> list[str]:
    return sorted(after, key=lambda method: (method != DENSE, -mean(after[method])))


def _fine_tuned(content: Content) -> tuple[list[str], Figure | None]:
    before, after = accuracies(content, OFF_THE_SHELF), accuracies(content, FINE_TUNED)
    if not after:
        return [], None
    example = next(iter(fine_tuned_rows(content).values()))
    lines = [f"The training: `{example['command']}`.", "", *markdown(fine_tuned_table(content))]
    return lines, _gains(content, _ranked(after), before, after)


def _gains(
    content: Content, ranked: Sequence[str], before: dict[str, list[float]], after: dict[str, list[float]]
) -> Figure:
    """Return a plot of the accuracy of every method before and after its training, the best on top."""
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(ranked)), dpi=120, layout="constrained")
    axis = figure.subplots()
    trained = [100 * mean(after[m]) for m in ranked]
    halves = [half_width(after[m], content["test_images"]) for m in ranked]
    shelf = [(100 * before[m][0], row) for row, m in enumerate(ranked) if m in before]
    axis.hlines([row for _, row in shelf], [x for x, _ in shelf], [trained[row] for _, row in shelf], "0.7", lw=1.5)
    if shelf:
        axis.plot(*zip(*shelf, strict=True), "o", mfc="white", color="C1", ms=5, label="off the shelf")
    axis.errorbar(trained, range(len(ranked)), xerr=halves, fmt="o", ms=5, capsize=2, label="trained")
    if DENSE in before:
        axis.axvline(100 * before[DENSE][0], color="black", lw=0.8, ls="--", label="dense, off the shelf")
    axis.set_yticks(range(len(ranked)), map(short_name, ranked), fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=f"{content['metric']} (%)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=7, loc="upper left")
    return figure


def _placement(content: Content) -> tuple[list[str], Figure | None]:
    after = accuracies(content, FINE_TUNED)
    rows = fine_tuned_rows(content)
    placed = {method: place for method in rows if (place := _place(trial_of(rows[method]))) is not None}
    if len(placed) < 2:
        return [], None
    table = [["method", "tokens", "before block", "GMACs", "of dense", "accuracy"]]
    figure = Figure(figsize=(6, 4.5), dpi=120, layout="constrained")
    axis = figure.subplots()
    for number, (option, tokens) in enumerate(sorted({(trial_of(rows[m]).option, t) for m, (_, t) in placed.items()})):
        own = [m for m, (_, t) in placed.items() if (trial_of(rows[m]).option, t) == (option, tokens)]
        own.sort(key=lambda method: placed[method])
        x, y = [rows[m]["gmacs"] for m in own], [100 * mean(after[m]) for m in own]
        halves = [half_width(after[m], content["test_images"]) for m in own]
        axis.errorbar(x, y, halves, label=f"{option}, {tokens} tokens", marker="osv^"[number % 4], capsize=2, lw=1.2)
        for m, gmacs, accuracy, half in zip(own, x, y, halves, strict=True):
            cells = [f"{gmacs:.3f}", f"{rows[m]['share']:.0%}", f"{accuracy:.2f}% ± {half:.2f}"]
            table.append([option, str(tokens), str(placed[m][0]), *cells])
            axis.annotate(f"at {placed[m][0]}", (gmacs, accuracy), (4, -10), textcoords="offset points", fontsize=7)
    if DENSE in after:
        dense = rows[DENSE]["gmacs"], 100 * mean(after[DENSE]), half_width(after[DENSE], content["test_images"])
        axis.errorbar(*dense, label="dense", color="black", marker="*", ms=11, capsize=2)
    axis.set(xlabel="GMACs per image", ylabel=f"{content['metric']} (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return markdown(table), figure


def _place(trial: Trial) -> tuple[int, int] | None:
    """Return the block and the number of tokens of a TokenLearner in one place, or None."""
    found = re.fullmatch(r"at=(\d+) num_tokens=(\d+)", trial.setting)
    return (int(found[1]), int(found[2])) if found and trial.option in PLACED else None
