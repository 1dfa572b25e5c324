"""The confusion matrix of the test set, and the accuracy of every class."""

import csv
from pathlib import Path

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchmetrics.utilities.plot import plot_confusion_matrix

from fewtokens.analysis.evaluation import class_names
from fewtokens.analysis.pictures.drawing import write_png
from fewtokens.files import replace_file

READABLE = 20  # classes up to which names and numbers fit into the picture


class Confusion:
    """The measure of confusion between classes, from the test that was just run. Without a test it does nothing.

    Writes `confusion.csv`, with a row for every true class: its name, its samples, its accuracy, and how often each
    class was predicted. Draws `pictures/confusion.png`, which is `picture` after a call.
    """

    def __init__(self) -> None:
        self.picture: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Read and write the confusion matrix of a tested task.

        Args:
            task: Its `.confusion` counts the samples of every class (row) by predicted class (column).
            datamodule: Its `class_names`, if it has them, name the classes; otherwise they are numbered.
            run_dir: Folder of the files; created if it does not exist.

        Returns:
            `test/top1_class_mean`, the mean of the classes' accuracies, which frequent classes do not dominate, and
            `test/top1_class_worst`, the lowest of them. Classes without samples are ignored.
        """
        self.picture = None
        if getattr(task, "confusion", None) is None:
            return {}
        counts: NDArray[np.int64] = task.confusion.cpu().numpy()  # type: ignore[operator]
        names = class_names(datamodule, len(counts))
        _write(counts, names, run_dir / "confusion.csv")
        self.picture = run_dir / "pictures" / "confusion.png"
        write_png(draw(counts, names), self.picture)
        accuracies = _shares(counts).diagonal()[counts.sum(axis=1) > 0]
        return {
            "test/top1_class_mean": float(accuracies.mean()),
            "test/top1_class_worst": float(accuracies.min()),
        }


def draw(counts: NDArray[np.int64], names: list[str]) -> Figure:
    """Return a figure of the matrix, with every row as shares of its class."""
    number = len(counts)
    side = min(12.0, 3 + 0.6 * number)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axis = figure.subplots()
    readable = number <= READABLE
    plot_confusion_matrix(torch.from_numpy(_shares(counts)), axis, add_text=readable, labels=names, cmap="Blues")
    if not readable:
        axis.set(xticks=[], yticks=[])
    return figure


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _write(counts: NDArray[np.int64], names: list[str], path: Path) -> None:
    with replace_file(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "samples", "top1", *names])
        for name, row, accuracy in zip(names, counts, _shares(counts).diagonal(), strict=True):
            samples = row.sum()
            writer.writerow([name, samples, f"{accuracy:.6f}" if samples else "", *row])
