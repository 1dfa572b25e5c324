"""Where a training run stands: the one room that reads the progress counters of Lightning's loops."""

from typing import Any

import lightning as L


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
