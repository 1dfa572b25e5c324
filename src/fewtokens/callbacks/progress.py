"""Progress: a live bar on a terminal, one line per epoch elsewhere."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class EpochLines(ProgressBar):
    """One line per epoch, for logs and pipes."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.start = True, 0.0

    def disable(self) -> None:
        """Print nothing (Lightning calls this on ranks other than 0)."""
        self.enabled = False

    def enable(self) -> None:
        """Print again."""
        self.enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time; an epoch that is resumed in its middle does not start again."""
        super().on_train_start(trainer, pl_module)
        self.start = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Note the time."""
        self.start = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's numbers."""
        if not self.enabled:
            return
        numbers = {k: float(v) for k, v in trainer.callback_metrics.items() if k in SHOWN}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in sorted(numbers.items()))
        seconds = time.monotonic() - self.start
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}  {seconds:.1f} s", flush=True)


SHOWN = ("train/loss", "val/loss", "val/top1")


def progress() -> ProgressBar:
    """Rich's bar on a terminal, lines elsewhere."""
    return RichProgressBar(leave=False) if sys.stderr.isatty() and sys.stdout.isatty() else EpochLines()
