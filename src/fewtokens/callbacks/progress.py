"""Progress of training: a live bar on a terminal, and one line per epoch elsewhere. Epochs are counted from 1."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

SHOWN = ("train/loss", "val/loss", "val/top1", "val/map")


class EpochLines(ProgressBar):
    """Prints one line per epoch, for logs and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.start = True, 0.0

    def disable(self) -> None:
        """Print nothing. Lightning calls this on all ranks but 0."""
        self.enabled = False

    def enable(self) -> None:
        """Print again."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time, because an epoch that resumes in its middle does not start again."""
        super().on_train_start(trainer, pl_module)
        self.start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Record the time."""
        self.start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the epoch and its duration."""
        if not self.enabled:
            return
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k in SHOWN}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in sorted(numbers.items()))
        seconds = time.monotonic() - self.start
        print(f"epoch {_epoch(trainer)}  {shown}  {seconds:.1f} s", flush=True)


class EpochBar(RichProgressBar):
    """Rich's bar, with the metrics of the last finished epoch.

    Lightning's own bar copies the metrics from the device after every step, for which the CPU waits until the GPU has
    finished the step.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._metrics: dict[str, Any] = {}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics, as they were at the end of the last epoch."""
        if not trainer.training or trainer.is_last_batch:
            self._metrics = super().get_metrics(trainer, pl_module)
        return self._metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {_epoch(self.trainer)}".ljust(len(self.validation_description))


def progress() -> ProgressBar:
    """Return Rich's bar on a terminal, and lines elsewhere."""
    return EpochBar() if sys.stderr.isatty() and sys.stdout.isatty() else EpochLines()


def _epoch(trainer: Trainer) -> str:
    known = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"{trainer.current_epoch + 1}/{trainer.max_epochs}" if known else str(trainer.current_epoch + 1)
