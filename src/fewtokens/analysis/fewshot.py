"""Few-shot transfer: how well a few training images per class tell the classes apart, by a model's frozen features.

The linear probe is the one of the Vision Transformer and TokenLearner papers, as google-research/big_vision defines it
(`evaluators/fewshot_lsr.py`, `configs/common_fewshot.py`): a regression with a closed form, on whitened features with a
bias, to targets of -1 and 1.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from fewtokens.analysis.evaluation import evaluating_eagerly, images_at, interval, unwrap_compiled
from fewtokens.analysis.throughput import AUTOCAST, autocast, trainer_precision
from fewtokens.backbones.vit import ViT
from fewtokens.data import seeding
from fewtokens.errors import FewtokensError, check, check_choice

BIAS = 100.0  # value of the constant feature, so large that the regularization hardly acts on its weight
SMALLEST = 1e-5  # added to the deviation of every feature
HEADS = ("head", "head_dist")
KNN = "knn"


class Fewshot:
    """The measure of few-shot transfer: probes on frozen features of a few training images per class.

    Every draw takes other training images at random. All images are preprocessed as in evaluation. The draws do not
    depend on the model, so that models are compared on the same images.

    Args:
        shots: Numbers of training images per class for the linear probe.
        draws: Number of draws.
        l2: Strength of the regularization of the linear probe (big_vision: 1024).
        neighbors: Number of neighbors of the k-NN probe, which votes among the images of the largest number of shots.
        test_per_class: Test images per class, chosen at random; None for all.
        batch_size: Images per forward pass.
        precision: "32-true", "bf16-mixed" or "16-mixed", of the model; None for that of the task's trainer. The probes
            are computed in float64 and float32.
        seed: Seed of the draws.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(
        self,
        shots: Sequence[int] = (1, 5, 10, 25),
        draws: int = 5,
        l2: float = 1024.0,
        neighbors: int = 10,
        test_per_class: int | None = None,
        batch_size: int = 100,
        precision: str | None = None,
        seed: int = 0,
    ) -> None:
        valid = len(shots) > 0 and all(isinstance(k, int) and k >= 1 for k in shots)
        check(valid, "measure.fewshot.shots", "a list of ints >= 1", list(shots))
        for name, value in {"draws": draws, "neighbors": neighbors, "batch_size": batch_size}.items():
            check(value >= 1, f"measure.fewshot.{name}", "an int >= 1", value)
        check(l2 > 0, "measure.fewshot.l2", "a number > 0", l2)
        valid = test_per_class is None or test_per_class >= 1
        check(valid, "measure.fewshot.test_per_class", "an int >= 1 or null", test_per_class)
        check(seed >= 0, "measure.fewshot.seed", "an int >= 0", seed)
        check_choice("measure.fewshot.precision", precision, (None, "32-true", *AUTOCAST))
        self.shots, self.draws, self.l2, self.neighbors = sorted(set(shots)), draws, l2, neighbors
        self.test_per_class, self.batch_size, self.precision, self.seed = test_per_class, batch_size, precision, seed

    def __call__(self, task: L.LightningModule, datamodule: L.LightningDataModule, run_dir: Path) -> dict[str, float]:
        """Probe the features of a task's model.

        Args:
            task: The features are the input of the head of its `.model`.
            datamodule: One of images, with one class each.
            run_dir: Not used.

        Returns:
            `fewshot/<k>shot` and `fewshot/knn`: accuracies on the test images, averaged over the draws; the same names
            with `_interval`: half the width of the 95 % confidence interval of the mean over draws, if there are
            several; `fewshot/draws`; `fewshot/test_images`.
        """
        images = self.choose(datamodule)
        with autocast(task.device, self.precision or trainer_precision(task)):
            features = images.features(unwrap_compiled(task.model), task.device)
        found = self.probe(images, *features)
        numbers = {f"fewshot/{name}": value for name, value in summarize(found).items()}
        return numbers | {"fewshot/draws": float(self.draws), "fewshot/test_images": float(len(images.test))}

    def choose(self, datamodule: L.LightningDataModule) -> "Images":
        """Choose the images of all draws and of the test.

        Raises:
            FewtokensError: The datamodule has no images with one class each, or too few of a class.
        """
        train, test = _parts(datamodule)
        labels, truth = _labels(train), _labels(test)
        few = torch.stack([choose(labels, self.shots[-1], self.seed, 0, draw) for draw in range(self.draws)])
        known, where = few.unique(return_inverse=True)
        chosen = torch.arange(len(truth))
        if self.test_per_class is not None:
            chosen = choose(truth, self.test_per_class, self.seed, 1, 0).flatten().sort().values
        return Images(datamodule, train, test, known, chosen, where, labels[known], truth[chosen], self.batch_size)

    def probe(self, images: "Images", few: Float[Tensor, "n c"], test: Float[Tensor, "m c"]) -> dict[str, list[float]]:
        """Return the accuracies of every probe, one for each draw.

        Args:
            images: The chosen images.
            few: Features of `images.few` (N, C).
            test: Features of `images.test` (M, C).
        """
        found: dict[str, list[float]] = {name: [] for name in (*(f"{k}shot" for k in self.shots), KNN)}
        for draw in images.draws:
            for k in self.shots:
                rows = draw[:, :k].flatten()
                labels, classes = _numbered(images.labels[rows])
                linear = regress(few[rows], labels, test, self.l2)
                found[f"{k}shot"].append(_accuracy(linear, classes, images.truth))
            # `rows` are now those of the largest number of shots.
            near = vote(few[rows], labels, test, self.neighbors)
            found[KNN].append(_accuracy(near, classes, images.truth))
        return found


@dataclass(frozen=True)
class Images:
    """The images of a few-shot evaluation.

    Args:
        datamodule: Preprocesses the images.
        train_set: The training images, read as in evaluation.
        test_set: The test images.
        few: Positions in `train_set` of all images that a draw uses (N,), each once.
        test: Positions in `test_set` of the test images (M,).
        draws: For every draw, class and shot the row of `few` (draws, classes, shots).
        labels: Classes of `few` (N,).
        truth: Classes of `test` (M,).
        batch_size: Images per forward pass.
    """

    datamodule: L.LightningDataModule
    train_set: Dataset
    test_set: Dataset
    few: Int[Tensor, " n"]
    test: Int[Tensor, " m"]
    draws: Int[Tensor, "d c k"]
    labels: Int[Tensor, " n"]
    truth: Int[Tensor, " m"]
    batch_size: int

    def features(self, model: ViT, device: torch.device) -> tuple[Float[Tensor, "n c"], Float[Tensor, "m c"]]:
        """Return the features of `few` and of `test` on the CPU, in float32 also under autocast.

        Args:
            model: In any mode; it is evaluated.
            device: Its device.
        """
        with without_head(model), evaluating_eagerly(model):
            dtype = next(model.parameters()).dtype
            few, test = (
                torch.cat([model(batch.to(dtype)).float().cpu() for batch in self.batches(samples, positions, device)])
                for samples, positions in ((self.train_set, self.few), (self.test_set, self.test))
            )
        return few, test

    def batches(
        self, samples: Dataset, positions: Int[Tensor, " n"], device: torch.device
    ) -> Iterator[Float[Tensor, "b c *t h w"]]:
        """Return the images at some positions of `train_set` or `test_set`, preprocessed, on a device."""
        return images_at(self.datamodule, samples, positions.tolist(), self.batch_size, device)


@contextmanager
def without_head(model: ViT) -> Iterator[None]:
    """Return a context in which the model returns what its head sees (B, C) instead of logits.

    With the two heads of a distilled DeiT, this is the mean of what both see. A factorised encoder with an encoder over
    time has its head there; one without it averages the features over time.
    """
    vits = [model.vit, *([model.temporal.vit] if isinstance(getattr(model, "temporal", None), ViT) else [])]
    heads = [(vit, name, getattr(vit, name)) for vit in vits for name in HEADS if hasattr(vit, name)]
    for vit, name, _ in heads:
        setattr(vit, name, nn.Identity())
    try:
        yield
    finally:
        for vit, name, head in heads:
            setattr(vit, name, head)


def choose(labels: Int[Tensor, " n"], count: int, *seeds: int) -> Int[Tensor, "c k"]:
    """Return the positions of `count` images of every class (classes, count), chosen at random and in random order.

    Args:
        labels: Classes of all images.
        count: Images per class.
        *seeds: Numbers on which the choice depends, together with the class.

    Raises:
        FewtokensError: A class has fewer images.
    """
    rows = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < count:
            raise FewtokensError(
                f"`measure.fewshot` needs {count} images of every class, but class {label} has {len(members)}. Lower "
                "measure.fewshot.shots or measure.fewshot.test_per_class."
            )
        order = torch.randperm(len(members), generator=seeding.generator(seeding.SPLIT, *seeds, label))
        rows.append(members[order[:count]])
    return torch.stack(rows)


def regress(
    few: Float[Tensor, "n c"], labels: Int[Tensor, " n"], test: Float[Tensor, "m c"], l2: float
) -> Float[Tensor, "m k"]:
    """Fit a linear regression with an L2 penalty to one-hot targets of -1 and 1, and apply it to other images.

    Every feature is whitened on its own with its mean and deviation in `few`, and a constant feature of 100 is the
    bias. The weights W minimize |XW - Y|^2 + l2 |W|^2. They are computed in float64, by the smaller of the two systems
    of equations in W = (X'X + l2)^-1 X'Y = X'(XX' + l2)^-1 Y. Returns Z W for the other images Z.

    Args:
        few: Features to fit (N, C).
        labels: Their classes, from 0 to the number of classes - 1 (N,).
        test: Features of the other images (M, C).
        l2: Strength of the penalty, above 0.
    """
    few, test = few.double(), test.double()
    center, deviation = few.mean(dim=0), few.std(dim=0, correction=0) + SMALLEST
    x, z = (F.pad((part - center) / deviation, (0, 1), value=BIAS) for part in (few, test))
    y = 2 * F.one_hot(labels).double() - 1
    count, dim = x.shape
    if count < dim:
        weights = x.T @ torch.linalg.solve(x @ x.T + l2 * torch.eye(count), y)
    else:
        weights = torch.linalg.solve(x.T @ x + l2 * torch.eye(dim), x.T @ y)
    return z @ weights


def vote(
    few: Float[Tensor, "n c"], labels: Int[Tensor, " n"], test: Float[Tensor, "m c"], neighbors: int
) -> Float[Tensor, "m k"]:
    """Return for other images how many of the nearest images belong to every class, by the cosine of their features.

    Of classes with equally many votes, the one with the nearer images gets up to a half more.

    Args:
        few: Features of the images that vote (N, C).
        labels: Their classes, from 0 to the number of classes - 1 (N,).
        test: Features of the other images (M, C).
        neighbors: Number of nearest images; all if there are fewer.
    """
    neighbors = min(neighbors, len(few))
    few, votes = F.normalize(few, dim=1), F.one_hot(labels).float()
    found = []
    for part in F.normalize(test, dim=1).split(1024):  # one matrix for all of ImageNet would not fit into memory
        near, index = (part @ few.T).topk(neighbors, dim=1)
        found.append(torch.einsum("mn,mnk->mk", 1 + near / (2 * neighbors), votes[index]))
    return torch.cat(found)


def summarize(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of every probe over its draws, and half the width of its interval if there are several draws."""
    numbers: dict[str, float] = {}
    for name, values in found.items():
        numbers[name] = mean(values)
        half = interval(values)
        if half is not None:
            numbers[f"{name}_interval"] = half
    return numbers


def _parts(datamodule: L.LightningDataModule) -> tuple[Dataset, Dataset]:
    """Return the training images, read as in evaluation, and the test images."""
    part: Any = getattr(datamodule, "dataset", None)
    if part is None or getattr(datamodule, "frames", 1) > 1:
        raise FewtokensError(
            f"Few-shot transfer is measured on images, but the data are a {type(datamodule).__name__}. Choose data of "
            "images (data=cifar10, data=imagenet), or another measure."
        )
    datamodule.prepare_data()
    for stage in ("fit", "test"):
        datamodule.setup(stage)
    train, test = copy.copy(part("train")), part("test")
    # Of pictures in files: training crops are random, and unreadable training pictures replaced by others.
    for name in ("read", "decode", "transform", "part"):
        if hasattr(test, name):
            setattr(train, name, getattr(test, name))
    return train, test


def _labels(samples: Any) -> Int[Tensor, " n"]:
    """Return the class of every image, without reading the images."""
    labels = torch.as_tensor(getattr(samples, "samples", samples).targets)
    if labels.ndim != 1 or getattr(samples, "several", None) is not None:  # ReaL labels
        raise FewtokensError(
            "Few-shot transfer needs one class per image, but these data have several. Choose another measure."
        )
    return labels


def _numbered(labels: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " k"]]:
    """Return the labels numbered from 0, and the label of every number."""
    classes, numbers = labels.unique(return_inverse=True)
    return numbers, classes


def _accuracy(scores: Float[Tensor, "m k"], classes: Int[Tensor, " k"], truth: Int[Tensor, " m"]) -> float:
    return (classes[scores.argmax(dim=1)] == truth).double().mean().item()
