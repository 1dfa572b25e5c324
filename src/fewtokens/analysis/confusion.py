"""What was taken for what: accuracy class by class, and a picture of the confusion matrix."""

import csv
from pathlib import Path

import lightning as L
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

FEW = 30  # classes whose numbers can be read in the picture


class Confusion:
    """The measure of confusion, from the test that was just run; without one it does nothing.

    Writes `confusion.csv` (a line for each true class: its samples, its accuracy, and how often each class was said)
    and `pictures/confusion.png`, which is `picture` afterwards.
    """

    def __init__(self) -> None:
        self.picture: Path | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Reads the matrix of a tested task.

        Args:
            task: Its `.confusion` holds how many samples of every class (row) were taken for each (column).
            datamodule: Not looked at.
            run_dir: Made if there is none.

        Returns:
            `test/top1_class_mean`, the mean of the classes' accuracies, which does not favour frequent ones, and
            `test/top1_class_worst`; classes without a sample are left out.
        """
        self.picture = None
        if getattr(task, "confusion", None) is None:
            return {}
        counts: NDArray[np.int64] = task.confusion.cpu().numpy()  # type: ignore[operator]
        totals = counts.sum(axis=1)
        shares = counts.diagonal() / np.maximum(totals, 1)
        _write(counts, totals, shares, run_dir / "confusion.csv")
        self.picture = run_dir / "pictures" / "confusion.png"
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(draw(counts)).print_png(self.picture)
        seen = shares[totals > 0]
        return {"test/top1_class_mean": float(seen.mean()), "test/top1_class_worst": float(seen.min())}


def draw(counts: NDArray[np.int64]) -> Figure:
    """The matrix, each row as shares of its class."""
    number = len(counts)
    side = min(12.0, 2.5 + 0.4 * number)
    figure = Figure(figsize=(side, side), dpi=120, layout="constrained")
    axis = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="taken for class", ylabel="class")
    if number <= FEW:
        axis.set_xticks(range(number))
        axis.set_yticks(range(number))
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                colour = "white" if share > 0.5 else "black"
                axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=6, color=colour)
    return figure


def _write(counts: NDArray[np.int64], totals: NDArray[np.int64], shares: NDArray[np.float64], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "samples", "top1", *range(len(counts))])
        for index, row in enumerate(counts):
            writer.writerow([index, totals[index], f"{shares[index]:.6f}" if totals[index] else "", *row])
