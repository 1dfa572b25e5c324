"""Data sets that fit in memory: one uint8 tensor, a whole batch by one gather."""

from typing import NamedTuple, Unpack

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from fewtokens.data import seeding
from fewtokens.data.datamodule import Common, DataModule, Part
from fewtokens.errors import FewtokensError


class Samples(NamedTuple):
    """Images and their classes."""

    images: UInt8[Tensor, "n c h w"]
    targets: Int64[Tensor, " n"]

    def take(self, indices: Int64[Tensor, " m"]) -> "Samples":
        """The samples with these indices, in this order."""
        return Samples(self.images[indices], self.targets[indices])


class MemoryDataset(Dataset):
    """Samples of which the DataLoader gets whole batches by `__getitems__` (9 times as fast as one by one)."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.targets)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "c h w"], Int64[Tensor, ""]]:
        return self.samples.images[index], self.samples.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"]]:
        """A batch, by one gather; index_select is several times as fast as indexing."""
        chosen = torch.tensor(indices)
        return self.samples.images.index_select(0, chosen), self.samples.targets.index_select(0, chosen)


class InMemory(DataModule):
    """Base of data sets in memory; a subclass says in `read` where they come from."""

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__(**common)
        self._parts: dict[Part, Samples] | None = None

    def read(self) -> dict[Part, Samples]:
        """The parts of the data set; "val" is absent where nothing is held out."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Downloads and decodes in one process per machine; the others find the cache."""
        if self._parts is None:
            self._parts = self.read()

    def setup(self, stage: str | None = None) -> None:
        """Reads the samples and compares them with the facts of the configuration."""
        self.prepare_data()
        for part in ("train", "val", "test"):
            self.verify(part)

    def dataset(self, part: Part) -> MemoryDataset | None:
        """The samples of a part."""
        samples = (self._parts or {}).get(part)
        return MemoryDataset(samples) if samples is not None else None

    def verify(self, part: Part) -> None:
        """Compares the number of classes, too."""
        samples = (self._parts or {}).get(part)
        if samples is not None and (found := int(samples.targets.max()) + 1) != self.num_classes:
            raise FewtokensError(
                f"data.num_classes is the number of classes of {self.description}",
                expected=f"data.num_classes={found}",
                got=f"data.num_classes={self.num_classes}",
                fix=f"set data.num_classes={found}",
            )
        super().verify(part)


def hold_out(samples: Samples, count: int, seed: int) -> tuple[Samples, Samples]:
    """Splits `count` samples off, every class by its share; (the rest, the split-off), both in the old order.

    Args:
        samples: What to split.
        count: How many to split off; classes whose share is no whole number are rounded by largest remainder.
        seed: Chooses which; independent of the run's seed, so that all runs are measured on the same samples.

    Raises:
        FewtokensError: If `count` leaves nothing to train on.
    """
    check_held_out(count, len(samples.targets))
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
    """Raises a FewtokensError unless 0 <= count < size."""
    if not 0 <= count < size:
        raise FewtokensError(
            "The validation part is held out of the training images",
            expected=f"0 (none) to {size - 1} images",
            got=count,
            fix="change data.val_images",
        )
