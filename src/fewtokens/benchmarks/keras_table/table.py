"""The table of the Keras TokenLearner example: the published numbers, a csv row for each run, and the page of both."""

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fewtokens.analysis.cost import macs
from fewtokens.analysis.evaluation import interval
from fewtokens.benchmarks.children import HOME
from fewtokens.benchmarks.keras_table.profiler_count import keras_flops
from fewtokens.data.image.cifar10 import find_source
from fewtokens.errors import FewtokensError
from fewtokens.files import replace_file
from fewtokens.runs import report
from fewtokens.runs.config import CONFIGS, instantiate

Row = dict[str, str]
COLUMNS = (
    *("row", "seed", "test_top1", "val_top1", "gmacs", "params", "epochs", "precision", "dataset"),
    *("split", "measured_on", "torch", "lightning", "commit", "date", "command"),
)
SETTING = ("dataset", "split", "precision", "epochs")  # runs that differ in one of these are not averaged
KEY = ("row", "seed", *SETTING)


class Published(NamedTuple):
    """The example's numbers for a model: top-1 accuracy in percent (means of 5 runs), and GFLOPs by its own count."""

    model: str
    top1: str
    gflops: float


PUBLISHED = {
    "keras_plain": Published("4 layers", "56.112; 56.37 (second set of runs)", 0.0184),
    "keras_8_tokens": Published("4 layers, TokenLearner, 8 tokens", "56.55", 0.0153),
    "keras_4_tokens": Published("4 layers, TokenLearner, 4 tokens", "56.498 (second set of runs)", 0.0147),
    "keras_8_layers": Published("8 layers", "55.36", 0.0359),
    "keras_v11_g4_t4": Published('4 layers, "1.1", 4 groups, 4 tokens', '54.638 (row 4/4); 55.196 (row "4/8")', 0.0149),
    "keras_v11_g8_t4": Published('4 layers, "1.1", 8 groups, 4 tokens', '54.898 (row "8/8")', 0.0146),
}
NOTES = """\
`top-1` is the test accuracy in percent, of the weights with the best validation. The interval is Student's 95 %
confidence interval of the mean over seeds. The example gives no spread, and its two sets of runs of the plain model
differ about as much as its rows with and without TokenLearner. `GMACs` counts every multiply-add. `example's count` is
the count of TensorFlow's profiler, which excludes all products of attention, and the published column is such a count.
The published counts show that 4 tokens were used in all three rows called "1.1"."""


def dataset_name(root: Path) -> str:
    """Return the name of the CIFAR-10 in a folder, from the source that the datamodule chooses.

    Raises:
        FewtokensError: The folder contains neither the official archive nor class folders.
    """
    if find_source(root) in ("extracted", "archive"):
        return "CIFAR-10 (official archive)"
    pictures = (p.suffix.lower() for p in root.glob("train/*/*") if not p.name.startswith("."))
    kind = next(pictures, None)
    if kind is None:
        raise FewtokensError(
            f"There is no CIFAR-10 in {root}, neither the archive nor train/<class>/*. Set `--root` to its folder, or "
            "name the data of runs from elsewhere with `--data-name`."
        )
    copy = "JPEG" if kind in (".jpg", ".jpeg") else kind.lstrip(".").upper()
    return f"CIFAR-10 ({copy} copy, class folders)"


def collect(folder: Path, data_name: str | None = None) -> Row:
    """Return the csv row of a finished run, from its own files."""
    cfg, ran, numbers = OmegaConf.load(folder / "config.yaml"), OmegaConf.load(folder / "run.json"), report.read(folder)
    assert numbers is not None
    with (folder / "metrics.csv").open(newline="") as file:
        best = max((float(r["val/top1"]) for r in csv.DictReader(file) if r.get("val/top1")), default=None)
    found = {f: numbers.get(f"cost/{f}") for f in ("gmacs", "params")}
    found |= {"test_top1": numbers.get("test/top1"), "val_top1": best, "epochs": numbers["train/epochs"]}
    values = {
        **{name: "" if value is None else f"{value:.10g}" for name, value in found.items()},
        "row": str(cfg.name).rpartition("/")[2],
        "seed": str(cfg.seed),
        "precision": str(cfg.trainer.precision),
        "dataset": data_name or dataset_name(HOME / Path(cfg.data.root).expanduser()),
        "split": f"{cfg.data.split}, {cfg.data.val_images} held out",
        "measured_on": ran.measured_on if "measured_on" in ran else ran.device,
        "torch": ran.versions.torch,
        "lightning": ran.versions.lightning,
        "commit": ran.commit or "",
        "date": ran.written,
        "command": ran.command.replace(str(cfg.data.root), "<cifar10>"),  # without the path, which differs elsewhere
    }
    return {name: values[name] for name in COLUMNS}


def read(path: Path) -> list[Row]:
    """Return the rows of the csv, none if it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row | {"measured_on": row.get("measured_on", row.get("device"))} for row in csv.DictReader(file)]
    return [{name: row.get(name) or "" for name in COLUMNS} for row in rows]  # `device` is the name in old files


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Return all rows, sorted as in the table. A new row replaces the old row of the same run."""
    rows = {tuple(row[name] for name in KEY): row for row in (*old, *new)}
    order = {name: index for index, name in enumerate(PUBLISHED)}
    return sorted(
        rows.values(), key=lambda x: (order.get(x["row"], len(order)), [x[n] for n in SETTING], int(x["seed"]))
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """Write the csv, completely or not at all, and the page beside it."""
    with replace_file(path, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".md").write_text(page(rows, costs(PUBLISHED)))


def costs(names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Return GMACs per image, and the example's count of them, for experiments in configs/experiment/cifar10/."""
    found = {}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name in names:
            cfg = compose("train", [f"experiment=cifar10/{name}"])
            model = instantiate(cfg.backbone).eval()
            image = torch.zeros(1, cfg.data.channels, cfg.data.image_size, cfg.data.image_size)
            found[name] = (macs(model, image) / 1e9, keras_flops(model) // 2 / 1e9)
    return found


def page(rows: Sequence[Row], costs: Mapping[str, tuple[float, float]]) -> str:
    """Return the page, with a table for each setting (data, split, precision, epochs), from the csv and the costs."""
    parts = [
        "# CIFAR-10: the Keras TokenLearner example",
        "Written by `python -m fewtokens.benchmarks.keras_table`.",
        NOTES,
    ]
    settings = sorted({tuple(row[name] for name in SETTING) for row in rows})
    for setting in settings:
        chosen = [row for row in rows if tuple(row[name] for name in SETTING) == setting]
        data, split, precision, epochs = setting
        parts.append(f"## {data}, {precision}, {epochs} epochs\n\nValidation: {split}. {_environment(chosen)}")
        head = "| model | published top-1 | top-1 here, 95 % | seeds | GMACs | example's count | published GFLOPs |"
        lines = [_line(name, chosen, costs[name]) for name in PUBLISHED]
        parts.append("\n".join([head, "|---|---|---|---|---|---|---|", *lines]))
        missing = [name for name in PUBLISHED if all(row["row"] != name for row in chosen)]
        if missing:
            parts.append(f"Not run: {', '.join(missing)}.")
    if not any("official archive" in setting[0] for setting in settings):
        parts.append("No run has used the official archive, on which the published numbers were measured.")
    return "\n\n".join(parts) + "\n"


def _environment(rows: Sequence[Row]) -> str:
    words = sorted({f"{x['measured_on']}, torch {x['torch']}, lightning {x['lightning']}" for x in rows})
    return f"Run on: {'; '.join(words)}."


def _line(name: str, rows: Sequence[Row], cost: tuple[float, float]) -> str:
    model, published, gflops = PUBLISHED[name]
    counted = f"{cost[0]:.4f} | {cost[1]:.4f} | {gflops}"
    own = [row for row in rows if row["row"] == name and row["test_top1"]]
    if not own:
        return f"| {model} | {published} | not run | 0 | {counted} |"
    top1 = [100 * float(row["test_top1"]) for row in own]
    half = interval(top1)
    spread = "(n = 1, no interval)" if half is None else f"± {half:.2f}"
    seeds = f"{len(own)} ({', '.join(row['seed'] for row in own)})"
    return f"| {model} | {published} | {statistics.mean(top1):.2f} {spread} | {seeds} | {counted} |"
