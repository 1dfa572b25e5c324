"""Data sets that fit in memory: one uint8 tensor of images, from which a batch is gathered at once."""

from typing import NamedTuple, Unpack

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from fewtokens.data import seeding
from fewtokens.data.datamodule import Common, DataModule, Part
from fewtokens.errors import check


class Samples(NamedTuple):
    """Images and their classes."""

    images: UInt8[Tensor, "n c h w"]
    targets: Int64[Tensor, " n"]

    def take(self, indices: Int64[Tensor, " m"]) -> "Samples":
        """Return the samples with these indices, in this order."""
        return Samples(self.images[indices], self.targets[indices])


class MemoryDataset(Dataset):
    """Samples that are read a batch at a time with `__getitems__`, 9 times as fast as one by one."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.targets)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], Int64[Tensor, ""]]:
        return self.samples.images[index], self.samples.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]:
        """Return a batch. index_select is several times as fast as indexing."""
        chosen = torch.tensor(indices)
        return self.samples.images.index_select(0, chosen), self.samples.targets.index_select(0, chosen)


class InMemory(DataModule):
    """Base class for data sets in memory. A subclass implements `read`."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self._parts: dict[Part, Samples] | None = None

    def read(self) -> dict[Part, Samples]:
        """Return the parts of the data set, without "val" if nothing is held out."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download and decode the data in one process per machine. The others find them in the cache."""
        if self._parts is None:
            self._parts = self.read()

    def setup(self, stage: str | None = None) -> None:
        """Read the samples and compare them with the settings."""
        self.prepare_data()
        for part in ("train", "val", "test"):
            self.verify(part)

    def dataset(self, part: Part) -> MemoryDataset | None:
        """Return the samples of a part; None if it is empty."""
        samples = (self._parts or {}).get(part)
        return MemoryDataset(samples) if samples is not None else None

    def verify(self, part: Part) -> None:
        """Compare the number of classes in the training part with the settings, and see `DataModule.verify`."""
        samples = (self._parts or {}).get(part)
        if samples is not None and part == "train":  # a small validation part may lack some classes
            found = int(samples.targets.max()) + 1
            expected = f"{found}, the number of classes of {self.description}"
            check(found == self.num_classes, "data.num_classes", expected, self.num_classes)
        super().verify(part)


def hold_out(samples: Samples, count: int, seed: int) -> tuple[Samples, Samples]:
    """Split off `count` samples, stratified by class.

    Args:
        samples: The samples to split.
        count: Number of samples to split off. Fractional shares of a class are rounded by largest remainder.
        seed: Chooses the samples. Independent of the run's seed, so that all runs are validated on the same samples.

    Returns:
        The remaining samples and those split off, both in their original order.

    Raises:
        FewtokensError: `count` leaves nothing to train on.
    """
    check_held_out(count, len(samples.targets))
    check(seed >= 0, "data.split_seed", "an int >= 0", seed)
    sizes = torch.bincount(samples.targets).double() * (count / len(samples.targets))
    shares = sizes.floor().long()
    shares[(sizes - shares).argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    held = torch.zeros(len(samples.targets), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        members = (samples.targets == label).nonzero().flatten()
        draws = torch.randperm(len(members), generator=seeding.generator(seeding.SPLIT, seed, label))
        held[members[draws[:share]]] = True
    return samples.take((~held).nonzero().flatten()), samples.take(held.nonzero().flatten())


def check_held_out(count: int, size: int) -> None:
    """Raise a FewtokensError unless `count` of `size` training images can be held out for validation."""
    check(0 <= count < size, "data.val_images", f"from 0 (no validation) to {size - 1}", count)
