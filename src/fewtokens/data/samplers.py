"""Samplers for any number of processes (Lightning's `use_distributed_sampler` stays False), and where training is."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import Sampler

from fewtokens.data import seeding
from fewtokens.errors import FewtokensError


class TrainSampler(Sampler[int]):
    """A permutation that depends only on (seed, epoch). Rank r of w takes every w-th entry, starting at the r-th.

    The permutation is cut to a multiple of the world size, since ranks with fewer batches would deadlock the others.

    Args:
        size: Samples in the data set.
        batch_size: Samples per batch of one process; only `skip` needs it.
        seed: The run's seed.
        rank: Rank of this process.
        world: Number of processes.
        epoch: The first epoch, since Lightning asks for the first iterator before it calls `set_epoch`.
        stamped: Yield `epoch * size + index` instead of `index`, for data sets whose workers augment and therefore need
            to know the epoch. With `repeats`, every repetition has an epoch number of its own.
        repeats: Times that a sample occurs in a row, on other ranks if possible (repeated augmentation, Hoffer et al.,
            arXiv:1901.09335). An epoch keeps its length, so that it has a random part of the samples.

    Raises:
        FewtokensError: There are fewer samples than processes.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epoch: int = 0,
        stamped: bool = False,
        repeats: int = 1,
    ) -> None:
        if size < world:
            raise FewtokensError(
                f"{world} processes need at least {world} training samples, got {size}. Use fewer devices or more data."
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world, self.stamped, self.repeats = rank, world, stamped, repeats
        self.epoch = epoch
        self._skipped = (epoch, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of the next iteration. Lightning calls this before every epoch."""
        self.epoch = epoch

    def skip(self, epoch: int, batches: int) -> None:
        """Start every iteration of `epoch`, and of no other epoch, after `batches` batches. `len()` does not change."""
        self._skipped = (epoch, batches)

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=seeding.generator(seeding.ORDER, self.seed, self.epoch))
        order = order[: -(-self.size // self.repeats)].repeat_interleave(self.repeats)[: self.size]
        if self.stamped:
            order += (self.epoch * self.repeats + torch.arange(self.size) % self.repeats) * self.size
        mine = order[self.rank :: self.world][: len(self)]
        epoch, batches = self._skipped
        if epoch == self.epoch:
            mine = mine[batches * self.batch_size :]
        # A list, since worker processes use the epoch at the time of iter(), and without workers it must be the same.
        return iter(mine.tolist())


class EvalSampler(Sampler[int]):
    """Yields every sample exactly once over all ranks, in order, without padding or cutting.

    Ranks may differ by one sample. Evaluation has no collective operation per step, so this cannot deadlock.
    """

    def __init__(self, size: int, *, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, size, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def resume_position(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epoch in which a run resumed from here continues, and the number of its batches already used.

    This is correct in every hook in which a checkpoint is written (as read in Lightning 2.6.6 and tested). In
    `on_train_batch_end`, `completed` does not yet include the batch, so `processed` is used. After the last batch of an
    epoch, the epoch counts as running until its end hooks are done, although nothing of it is left. In
    `on_train_epoch_end`, the counters of its batches are stale.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current  # Lightning declares a base class without these counters
    if epochs.processed >= epochs.started:
        return epochs.processed, 0
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.processed >= trainer.num_training_batches:
        return epochs.processed + 1, 0
    return epochs.processed, batches.processed


def batch_position(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epoch of the training batch that is being moved to the device, and its index in the epoch."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return epochs.processed, trainer.fit_loop.epoch_loop.batch_progress.current.ready
