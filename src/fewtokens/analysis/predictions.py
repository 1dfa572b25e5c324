"""A table of test images: label, prediction, tokens kept and multiply-adds of each."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from jaxtyping import UInt8

from fewtokens.analysis.evaluation import class_names, evaluating_eagerly, load_test_samples, unwrap_compiled
from fewtokens.analysis.flops import GIGA, count
from fewtokens.analysis.pictures.drawing import displayed
from fewtokens.errors import check
from fewtokens.files import replace_file

BATCH = 64
COLUMNS = ("label", "prediction", "probability", "tokens", "gmacs")


@dataclass(frozen=True)
class ImageTable:
    """Rows about images, for loggers that show tables.

    Args:
        pictures: The images, or the first frames of clips (N, H, W, 3).
        columns: Names of the values.
        rows: The values of every image.
    """

    pictures: UInt8[np.ndarray, "n h w 3"]
    columns: tuple[str, ...]
    rows: list[list[Any]]


class Predictions:
    """The measure that lists test images with label, prediction and cost. It returns no numbers.

    Writes `predictions.csv`. After a call, `table` is the same with the images.

    Args:
        num_images: Number of test images, the first ones.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, num_images: int = 64) -> None:
        check(num_images >= 1, "measure.predictions.num_images", "an int >= 1", num_images)
        self.num_images = num_images
        self.table: ImageTable | None = None

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Write `run_dir/predictions.csv`.

        The prediction is the class with the highest logit in the first view, and its probability that of a softmax.
        The label of a sample with several classes names all of them.

        Args:
            task: Its `.model` is run.
            datamodule: Set up for testing. Its `class_names`, if it has them, name the classes.
            run_dir: Folder of the run; created if it does not exist.
        """
        model = unwrap_compiled(task.model)
        images, targets = load_test_samples(task, datamodule, self.num_images)
        with evaluating_eagerly(model):
            logits = torch.cat([model(part).float() for part in images.split(BATCH)]).cpu()
        counts, names = count(model, images.split(BATCH)), class_names(datamodule, logits.shape[1])
        probability, predicted = logits.softmax(dim=1).max(dim=1)
        several = [[label] for label in targets.tolist()] if targets.ndim == 1 else [
            row.nonzero().flatten().tolist() for row in targets.cpu() > 0.5
        ]  # fmt: skip
        labels = [" + ".join(names[label] for label in row) for row in several]
        guesses, sure = [names[guess] for guess in predicted.tolist()], [round(p, 4) for p in probability.tolist()]
        tokens, gmacs = counts.tokens[:, -1].tolist(), (counts.macs.double() / GIGA).tolist()
        rows = [list(row) for row in zip(labels, guesses, sure, tokens, gmacs, strict=True)]
        with replace_file(run_dir / "predictions.csv", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", *COLUMNS])
            writer.writerows([number, *row] for number, row in enumerate(rows))
        frames = model.pictures(images)
        shown = displayed(frames[:: len(frames) // len(images)])
        pictures = (255 * shown).round().to(torch.uint8).movedim(1, -1).numpy()
        self.table = ImageTable(pictures, COLUMNS, rows)
        return {}
