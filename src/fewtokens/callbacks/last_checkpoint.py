"""The checkpoint from which a run resumes, written after every epoch and within long ones."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fewtokens.errors import check


class LastCheckpoint(Checkpoint):
    """Saves the state of the run after every epoch, and also within epochs if a number of steps or minutes is given.

    Lightning's ModelCheckpoint takes only one of the three, and skips the end of an epoch whose last step it has saved.
    Within an epoch, the state is saved after an optimizer step only, since accumulated gradients are not saved. It is
    not saved after the last batch of an epoch either: a run resumed there would skip the validation.

    Args:
        path: Path of the checkpoint.
        every_n_train_steps: Also save after every n-th optimizer step; None: not.
        every_minutes: Also save when this many minutes have passed since the last time; None: not.
        ask_every: With several processes, number of batches after which they tell each other whether the minutes have
            passed. This waits for the device, which would slow down every step.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(
        self,
        path: str,
        every_n_train_steps: int | None = None,
        every_minutes: float | None = None,
        ask_every: int = 10,
    ) -> None:
        steps, minutes = every_n_train_steps, every_minutes
        check(steps is None or steps >= 1, "callbacks.last.every_n_train_steps", "an int >= 1 or null", steps)
        check(minutes is None or minutes > 0, "callbacks.last.every_minutes", "a number > 0 or null", minutes)
        check(ask_every >= 1, "callbacks.last.ask_every", "an int >= 1", ask_every)
        self.path, self.every_n_train_steps, self.every_minutes = Path(path), steps, minutes
        self.ask_every = ask_every
        self._due, self._saved_at = False, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._due, self._saved_at = False, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after an optimizer step, if it is time."""
        ask = trainer.world_size == 1 or batch_idx % self.ask_every == 0
        if self.every_minutes is not None and ask:
            late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
            self._due |= trainer.strategy.reduce_boolean_decision(late, all=False)
        if not has_stepped(trainer, batch_idx):
            return
        if self.every_n_train_steps is not None:
            self._due |= trainer.global_step % self.every_n_train_steps == 0
        if self._due and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after every epoch."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._due, self._saved_at = False, time.monotonic()


def has_stepped(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether the training batch that has just ended was followed by a step of the optimizer."""
    return trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
