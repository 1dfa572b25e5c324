"""Samplers that share samples out over processes exactly once; Lightning's `use_distributed_sampler` stays False."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import Sampler

from fewtokens.data import seeding
from fewtokens.errors import FewtokensError


class TrainSampler(Sampler[int]):
    """A permutation that depends on (seed, epoch) alone; rank r of w takes every w-th entry, beginning at the r-th.

    The permutation is cut to a multiple of the world size, since unequal ranks would wait for one another for ever.

    Args:
        size: Samples in the data set.
        batch_size: Samples of one batch of one process; only `skip` needs it.
        seed: The run's seed.
        rank: This process.
        world: Number of processes.
        epoch: The epoch to begin with: Lightning asks for the first iterator before it calls `set_epoch`.
        stamped: Yield `epoch * size + index` instead of `index`, for data sets that draw their augmentation in the
            worker and must know the epoch there.

    Raises:
        FewtokensError: If there are fewer samples than processes.
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
    ) -> None:
        if size < world:
            raise FewtokensError(
                "Every process needs at least one training sample",
                expected=f"at least {world} samples",
                got=f"{size} samples",
                fix="use fewer devices or more training data",
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world, self.stamped = rank, world, stamped
        self.epoch = epoch
        self._skipped = (epoch, 0)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration (Lightning calls this before every epoch)."""
        self.epoch = epoch

    def skip(self, epoch: int, batches: int) -> None:
        """Lets every iteration of `epoch`, and of no other, start after `batches` batches; `len()` stays full."""
        self._skipped = (epoch, batches)

    def __len__(self) -> int:
        return self.size // self.world

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=seeding.generator(seeding.ORDER, self.seed, self.epoch))
        mine = order[self.rank :: self.world][: len(self)]
        epoch, batches = self._skipped
        if epoch == self.epoch:
            mine = mine[batches * self.batch_size :]
        # Not lazily: with worker processes the epoch counts at the time of iter(), and so it must without them.
        return iter((mine + self.epoch * self.size if self.stamped else mine).tolist())


class EvalSampler(Sampler[int]):
    """Every sample exactly once over all ranks, in order: nothing is padded and nothing is cut.

    Ranks may hold one sample more or less; evaluation has no collective per step, so nobody waits.
    """

    def __init__(self, size: int, *, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, size, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def position(trainer: L.Trainer) -> tuple[int, int]:
    """The epoch in which training goes on, and the batches of it that are already used.

    Right in every hook in which a checkpoint is written (read in Lightning 2.6.6, proven in the tests):
    `on_train_batch_end` comes before `completed` is counted up, hence `processed`; after the last batch of an epoch the
    epoch still counts as running until its end hooks, yet nothing of it is left; and in `on_train_epoch_end` the
    counters of its batches are stale.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current  # Lightning declares a base class without these counters
    if epochs.processed >= epochs.started:
        return epochs.processed, 0
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    if batches.processed >= trainer.num_training_batches:
        return epochs.processed + 1, 0
    return epochs.processed, batches.processed


def coming(trainer: L.Trainer) -> tuple[int, int]:
    """The epoch and the index in it of the training batch that is just being moved to the device."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return epochs.processed, trainer.fit_loop.epoch_loop.batch_progress.current.ready
