"""Write the tables of docs/benchmark.md from the files in docs/results (python -m fewtokens.benchmarks.tables).

The text of the page is written by hand. A table stands between `<!-- table: name -->` and `<!-- end -->`, and is
replaced by what the result of that name says now.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from fewtokens.analysis.evaluation import interval
from fewtokens.benchmarks import pareto, tradeoff
from fewtokens.benchmarks.children import HOME
from fewtokens.benchmarks.suite import page as suite
from fewtokens.benchmarks.suite.trials import FINE_TUNED
from fewtokens.benchmarks.variants import short_name
from fewtokens.errors import FewtokensError, check_choice
from fewtokens.files import replace_file

PAGE, RESULTS = HOME / "docs" / "benchmark.md", HOME / "docs" / "results"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
LEVELS = (0.8, 0.7, 0.6, 0.5)
SPEED = ("images_per_s", "gmacs", "gmacs_padded", "realised_over_theoretical")


def main() -> int:
    """Run the command and return its exit code."""
    try:
        text = filled(PAGE.read_text(), RESULTS)
        with replace_file(PAGE) as file:
            file.write(text)
    except FewtokensError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def filled(text: str, results: Path) -> str:
    """Return a page with its tables replaced by those of the results.

    Args:
        text: The page.
        results: Folder of the results.

    Raises:
        FewtokensError: A table has no such name, or the file of its result does not exist or is no json file.
    """

    def table(found: re.Match[str]) -> str:
        name = found[2]
        check_choice("The table", name, TABLES)
        file, rows = TABLES[name]
        try:
            content = json.loads((results / file).read_text())
        except (OSError, ValueError) as error:
            raise FewtokensError(
                f"The table {name} needs {file}, but reading it failed: {error}. Write it with sh docs/results/"
                f"{Path(file).stem}.sh, or remove the table."
            ) from error
        return "\n".join([found[1], *suite.markdown(rows(content)), "", found[3]])

    return BLOCK.sub(table, text)


def speed(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return a row for every batch size and method of one or several throughput.json, one for each process.

    With several, numbers are medians over the processes, and the lowest and the highest speed-up follow in brackets.
    """
    processes: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in records:
        processes.setdefault((record["batch"], record["tokenizer"]), []).append(record)
    rows = [["batch", "method", "images/s", "times dense", "GMACs", "padded", "realised/theoretical"]]
    for (batch, tokenizer), found in processes.items():
        rate, *numbers = (median(record[name] for record in found) for name in SPEED)
        row = [f"{rate:,.1f}", _times_dense(found), *(f"{number:.2f}" for number in numbers)]
        rows.append([str(batch), short_name(tokenizer), *row])
    return rows


def transfer(content: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the few-shot comparison: the accuracy with 10 and 25 images per class, and the k-NN."""
    probes = [probe for probe in ("10shot", "25shot", "knn") if probe in content["methods"][0]["draws"]]
    rows = [["method", "GMACs", "of dense", *(p.replace("shot", "-shot").replace("knn", "k-NN") for p in probes)]]
    for record in content["methods"]:
        found = [f"{record[p]:.1%} ± {100 * record[f'{p}_interval']:.1f}" for p in probes]
        rows.append([short_name(record["method"]), f"{record['gmacs']:.3f}", f"{record['share']:.0%}", *found])
    return rows


def overview(content: suite.Content) -> list[list[str]]:
    """Return a row for every method of the suite: off the shelf at equal cost, after training, and its speed.

    Trained methods come first. The others have no single setting, and thus neither GMACs nor a speed.
    """
    points = suite.points(content)
    levels = [tradeoff.accuracy_at(points, lambda point: point.share, level) for level in LEVELS]
    after, speeds = suite.accuracies(content, FINE_TUNED), {r["tokenizer"]: r for r in content["speed"]}
    trained = suite.fine_tuned_rows(content)
    tried = {method.split()[0] for method in trained}
    others = [point.method for point in points if point.method not in {tradeoff.DENSE, *tried}]
    rows = [["method", *(f"off the shelf, {level:.0%}" for level in LEVELS), "trained", "GMACs", "times dense"]]
    for method in dict.fromkeys([*trained, *others]):
        shelf = [f"{level[option]:.1%}" if (option := method.split()[0]) in level else "-" for level in levels]
        accuracy = cost = faster = "-"
        if method in trained:
            accuracy = f"{mean(after[method]):.1%} ± {suite.half_width(after[method], content['test_images']):.1f}"
            cost = f"{trained[method]['gmacs']:.3f}"
        if method in speeds:
            faster = f"{speeds[method]['speedup_vs_dense']:.2f}"
        rows.append([short_name(method), *shelf, accuracy, cost, faster])
    return rows


def clips(content: dict[str, Any]) -> list[list[str]]:
    """Return a row for every model and method on clips: means over the splits, with their interval, and the speed.

    A split is hard or easy for all methods alike, so the difference from the dense model is taken split by split.
    """
    timed: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in content["speed"]:
        timed.setdefault((record["model"], record["tokenizer"]), []).append(record)
    runs: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for run in content["runs"]:
        runs.setdefault((run["model"], run["method"], run["training"]), {})[run["split"]] = run["report"]
    dense = {model: reports for (model, method, _), reports in runs.items() if method == "none"}
    rows = [["ViViT model", "method", "training", "top-1", "minus dense", "GMACs per view", "times dense", "splits"]]
    for (model, method, training), reports in sorted(runs.items(), key=lambda item: item[0][0]):
        found = list(reports.values())
        values = [report["test/top1"] for report in found]
        accuracy = f"{mean(values):.1%} ± {suite.half_width(values, int(found[0]['test/videos'])):.1f}"
        baseline = dense.get(model.partition(",")[0], {})  # that of "1, one frame" is model 1
        difference = "-" if baseline is reports else _minus(reports, baseline)
        gmacs, std = (mean(report[name] for report in found) for name in ("cost/gmacs", "cost/gmacs_std"))
        speed = _times_dense(timed[model, method]) if (model, method) in timed else "-"
        cost = pareto.with_spread(gmacs, std, 2)
        rows.append([model, short_name(method), training, accuracy, difference, cost, speed, str(len(found))])
    return rows


def _times_dense(processes: list[dict[str, Any]]) -> str:
    """Return the median speed-up of the records of one method, and the lowest and the highest if they differ."""
    faster = [record["speedup_vs_dense"] for record in processes]
    spread = f" ({min(faster):.2f} to {max(faster):.2f})" if min(faster) < max(faster) else ""
    return f"{median(faster):.2f}{spread}"


def _minus(reports: Mapping[int, dict[str, Any]], baseline: Mapping[int, dict[str, Any]]) -> str:
    """Return the mean difference in points over the splits that both have, with its interval if there are several."""
    accuracy = "test/top1"
    differences = [100 * (reports[split][accuracy] - baseline[split][accuracy]) for split in reports.keys() & baseline]
    if not differences:
        return "-"
    half = interval(differences)
    return f"{mean(differences):+.1f}" + ("" if half is None else f" ± {half:.1f}")


TABLES: Mapping[str, tuple[str, Callable[[Any], list[list[str]]]]] = {
    "trained_attention": ("trained_attention.json", speed),
    "ats_layouts": ("ats_layouts.json", speed),
    "fewshot": ("fewshot_cifar10.json", transfer),
    "suite": ("finetune_cifar10.json", overview),
    "surveillance": ("surveillance.json", clips),
}


if __name__ == "__main__":
    sys.exit(main())
