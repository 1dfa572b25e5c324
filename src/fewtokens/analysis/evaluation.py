"""Helpers of all measures: the model in evaluation mode and on the right device, and samples of the test set."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import lightning as L
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.data import Dataset

from fewtokens.backbones.vit import ViT
from fewtokens.data.cores import available_cores
from fewtokens.data.datamodule import Loader, identity_collate

Sample = tuple[Float[Tensor, "b v *sample"], Shaped[Tensor, "b *k"]]


def unwrap_compiled(model: object) -> ViT:
    """Return the ViT inside the module that `torch.compile` returns, or the model itself if it is not compiled."""
    model = getattr(model, "_orig_mod", model)
    assert isinstance(model, ViT)
    return model


@contextmanager
def measured_on(task: L.LightningModule, device: torch.device) -> Iterator[None]:
    """Return a context in which the task is on `device` and in evaluation mode.

    `Trainer.fit` and `Trainer.test` end with moving the task to the CPU. Without this context, the measures of a run on
    a GPU would be those of the CPU.
    """
    before = task.device
    task.to(device)
    try:
        with evaluating(task):
            yield
    finally:
        task.to(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Return a context in which the model is in evaluation mode. Every submodule gets its own mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating_eagerly(model: nn.Module) -> Iterator[None]:
    """Return a context for evaluation without gradients and without compiled code, which cannot be inspected."""
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def evaluation_batches(
    task: L.LightningModule, datamodule: L.LightningDataModule, count: int | None = None
) -> Iterator[Sample]:
    """Yield the batches of the test set, as the model gets them.

    Args:
        task: The samples are moved to its device and converted to the type of its parameters.
        datamodule: Set up for testing.
        count: Number of samples, fewer if the test set is smaller; None for all of this process.

    Yields:
        All views (B, V, *sample) and the targets (B,) or (B, classes).
    """
    dtype, left = next(task.parameters()).dtype, count
    # `measured_dataloader` is that of our datamodules: videos are read in one view, and unreadable ones not counted
    # again. Other datamodules need not have it.
    for batch in getattr(datamodule, "measured_dataloader", datamodule.test_dataloader)():
        samples, targets = (part[:left].to(task.device) for part in batch)
        views, targets = datamodule.on_after_batch_transfer((samples, targets), 0)
        yield views.to(dtype), targets
        if left is not None:
            left -= len(views)
            if left <= 0:
                return


def images_at(
    datamodule: L.LightningDataModule,
    samples: Dataset,
    positions: Sequence[int],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Iterator[Float[Tensor, "b c *t h w"]]:
    """Yield the images or clips at some positions of a data set, as the model gets them, in their first view.

    Args:
        datamodule: Set up; it preprocesses the images.
        samples: A data set of it, such as its test set.
        positions: Where the images are, in their order.
        batch_size: Images per batch.
        device: The device on which they are preprocessed.
    """
    receive = getattr(datamodule, "receive", None)
    loader = Loader(
        samples,
        batch_size=batch_size,
        sampler=positions,
        num_workers=min(getattr(datamodule, "num_workers", 0), available_cores()),
        collate_fn=identity_collate,
        receive=None if receive is None else partial(receive, None),
    )
    for stored, targets in loader:
        yield datamodule.on_after_batch_transfer((stored.to(device), targets), 0)[0][:, 0]


def load_test_samples(
    task: L.LightningModule, datamodule: L.LightningDataModule, count: int
) -> tuple[Float[Tensor, "b c *t h w"], Shaped[Tensor, "b *k"]]:
    """Return the first `count` samples of the test set, in their first view, and their targets.

    Args:
        task: See `evaluation_batches`.
        datamodule: Set up for testing.
        count: Number of samples, at least 1; fewer are returned if the test set is smaller.
    """
    views, targets = zip(*evaluation_batches(task, datamodule, count), strict=True)
    return torch.cat([part[:, 0] for part in views]), torch.cat(targets)


def load_test_images(
    task: L.LightningModule, datamodule: L.LightningDataModule, count: int
) -> Float[Tensor, "b c *t h w"]:
    """Return the images or clips of `load_test_samples`."""
    return load_test_samples(task, datamodule, count)[0]


def random_images(model: ViT, count: int, seed: int) -> Float[Tensor, "b c *t h w"]:
    """Return `count` images or clips of the shape that the model takes, sampled from a normal distribution."""
    return torch.randn(count, *model.sample_shape, generator=torch.Generator().manual_seed(seed))


def class_names(datamodule: L.LightningDataModule | None, num_classes: int) -> list[str]:
    """Return the names of the classes. A class without a known name is named by its number."""
    names = getattr(datamodule, "class_names", None) or []
    return [str(name) for name in names] if len(names) == num_classes else [str(i) for i in range(num_classes)]


def interval(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % confidence interval of the mean (Student's t), or None for a single value."""
    from scipy.stats import t as student  # scipy takes a second to import

    if len(values) < 2:
        return None
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def proportion_interval(proportion: float, count: int) -> float:
    """Return half the width of the 95 % confidence interval of an accuracy over `count` images (Wilson's)."""
    z = 1.959964
    return z / (1 + z**2 / count) * (proportion * (1 - proportion) / count + z**2 / (4 * count**2)) ** 0.5
