"""Progress of a run: a live bar on a terminal, and lines elsewhere. Epochs are counted from 1."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text

from fewtokens.errors import check

SHOWN = ("train/loss", "val/loss", "val/top1", "val/map")  # train/top1 is logged after the line is printed


class Speed(Callback):
    """Logs `train/epoch_seconds`, with validation, and `train/images_per_s` of all processes, without it.

    The clock is read after every step, without waiting for the device. A GPU is only some operations behind.
    """

    def __init__(self) -> None:
        self.images, self.start, self.end = 0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, because an epoch that resumes in its middle does not start again."""
        self.images, self.start = 0, time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.images, self.start = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples."""
        self.images, self.end = self.images + samples_in(batch, trainer), time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log both numbers."""
        pl_module.log("train/epoch_seconds", time.monotonic() - self.start, rank_zero_only=True)
        if self.end > self.start:
            pl_module.log("train/images_per_s", self.images / (self.end - self.start), rank_zero_only=True)


class EpochLines(ProgressBar):
    """Prints one line per epoch, and one per some minutes within training epochs and evaluations, for logs and pipes.

    Args:
        every_minutes: Minutes from one line to the next.

    Raises:
        FewtokensError: A setting is out of range.
    """

    def __init__(self, every_minutes: float = 2.0) -> None:
        super().__init__()
        check(every_minutes > 0, "callbacks.progress.every_minutes", "a number > 0", every_minutes)
        self.enabled, self.start, self.every = True, 0.0, 60 * every_minutes
        self._loop, self._loop_start, self._first, self._images, self._printed = "", 0.0, 0, 0, 0.0

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

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        self._count(trainer, f"epoch {_epoch(trainer)}", batch, batch_idx, trainer.num_training_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        """Print a line if it is time."""
        if not trainer.sanity_checking:
            self._count(trainer, "validation", batch, batch_idx, trainer.num_val_batches[loader])

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        """Print a line if it is time."""
        self._count(trainer, "test", batch, batch_idx, trainer.num_test_batches[loader])

    def _count(self, trainer: Trainer, loop: str, batch: Any, index: int, total: int | float) -> None:
        now = time.monotonic()
        if loop != self._loop:  # the speed is that since the end of its first batch, which may include compilation
            self._loop, self._loop_start, self._first, self._images, self._printed = loop, now, index, 0, now
            return
        self._images += samples_in(batch, trainer)
        if not self.enabled or now - self._printed < self.every:
            return
        self._printed, rate = now, self._images / (now - self._loop_start)
        left = (total - index - 1) * (now - self._loop_start) / (index - self._first)
        ends = f"  {_minutes(left)} left" if total != float("inf") else ""
        print(f"{loop}  batch {index + 1}/{total}  {rate:,.0f} images/s{ends}", flush=True)


class EpochBar(RichProgressBar):
    """Rich's bar, with the time left, images per second, and the metrics of the last finished epoch.

    Lightning's own bar copies the metrics from the device after every step, for which the CPU waits until the GPU has
    finished the step.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._metrics: dict[str, Any] = {}
        self._speed = ImagesPerSecond()

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Return Lightning's columns, the last one with images instead of batches per second."""
        return [*super().configure_columns(trainer)[:-1], self._speed]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar."""
        self._speed.images = samples_in(batch, trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the bar."""
        self._speed.images = samples_in(batch, trainer)
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the bar."""
        self._speed.images = samples_in(batch, trainer)
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics, as they were at the end of the last epoch."""
        if not trainer.training or trainer.is_last_batch:
            self._metrics = super().get_metrics(trainer, pl_module)
        return self._metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {_epoch(self.trainer)}".ljust(len(self.validation_description))


class ImagesPerSecond(ProgressColumn):
    """The column of a bar with the images per second of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def render(self, task: Task) -> Text:
        """Return the text."""
        return Text(f"{(task.speed or 0) * self.images:,.0f} images/s", style="dim")


def progress(bar: bool | None = None, every_minutes: float = 2.0) -> ProgressBar:
    """Return Rich's bar or lines.

    Args:
        bar: Whether it is the bar; None: on a terminal it is.
        every_minutes: Minutes from one line to the next within an epoch or an evaluation.
    """
    if bar is None:
        bar = sys.stderr.isatty() and sys.stdout.isatty()
    return EpochBar() if bar else EpochLines(every_minutes)


def samples_in(batch: Any, trainer: Trainer) -> int:
    """Return the number of samples in a batch, (samples, targets), over all processes."""
    return len(batch[0]) * trainer.world_size


def _minutes(seconds: float) -> str:
    """Return a duration in hours and minutes: "1:05 h", "12 min"."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


def _epoch(trainer: Trainer) -> str:
    known = trainer.max_epochs is not None and trainer.max_epochs > 0
    return f"{trainer.current_epoch + 1}/{trainer.max_epochs}" if known else str(trainer.current_epoch + 1)
