"""The progress of a run: epochs from 1, and no wait for the device between the steps of an epoch."""

import re

import pytest
import torch
from lightning import LightningModule, Trainer
from rich.progress import Task as Task_
from torch.utils.data import DataLoader, TensorDataset

from fewtokens.callbacks import progress as module
from fewtokens.callbacks.progress import EpochBar, EpochLines, ImagesPerSecond, Speed, progress
from fewtokens.errors import FewtokensError

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


class Task(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val/top1", 0.5, prog_bar=True)

    def test_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(bar, **settings):
    batches = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2)
    trainer = Trainer(callbacks=[bar], **({"max_epochs": 2, "num_sanity_val_steps": 0} | settings), **QUIET)
    trainer.fit(Task(), batches, batches)
    return trainer


def test_lines_count_epochs_from_one(capsys):
    fit(EpochLines())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [re.sub(r"\d\.\d+", "#", line) for line in lines] == [
        "epoch 1/2  train/loss #  val/top1 #  # s",
        "epoch 2/2  train/loss #  val/top1 #  # s",
    ]


def test_lines_of_a_run_without_a_last_epoch(capsys):
    fit(EpochLines(), max_epochs=-1, max_steps=4)
    assert "epoch 1  train/loss" in capsys.readouterr().out


class Clock:
    """Advances by a second whenever it is read."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def test_lines_within_epochs_and_evaluations_tell_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    trainer = fit(EpochLines(every_minutes=1 / 30), max_epochs=1)
    trainer.test(trainer.lightning_module, DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=2), verbose=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    assert lines == [f"{loop}  batch 3/4  2 images/s  0 min left" for loop in ("epoch 1/1", "validation", "test")]
    with pytest.raises(FewtokensError, match=r"`callbacks\.progress\.every_minutes` must be a number > 0"):
        EpochLines(every_minutes=0.0)


def test_a_long_duration_is_in_hours():
    assert (module._minutes(59.0 * 60), module._minutes(125.0 * 60)) == ("59 min", "2:05 h")


def test_the_seconds_and_the_speed_of_an_epoch_are_logged(monkeypatch):
    monkeypatch.setattr(module, "time", Clock())
    found = fit(Speed(), max_epochs=1, enable_progress_bar=False).callback_metrics
    # Read at the start of training, of the epoch, after each of its 4 steps, and at its end.
    assert (found["train/epoch_seconds"], found["train/images_per_s"]) == (5, 8 / 4)


def test_the_bar_shows_images_per_second(monkeypatch):
    column = ImagesPerSecond()
    column.images = 64
    assert column.render(Seen(speed=10.0)).plain == "640 images/s"
    assert column.render(Seen(speed=None)).plain == "0 images/s"
    bar = EpochBar()
    fit(bar, max_epochs=1)
    assert bar._speed.images == 2
    assert isinstance(bar.configure_columns(bar.trainer)[-1], ImagesPerSecond)


class Seen(Task_):
    """A bar's task with a speed."""

    def __init__(self, speed):
        self._speed = speed

    speed = property(lambda self: self._speed)


def test_the_bar_counts_epochs_from_one(capsys):
    seen = []

    class Spy(EpochBar):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append(self.train_progress_bar.description.strip())

    fit(Spy())
    assert seen == ["Epoch 1/2"] * 4 + ["Epoch 2/2"] * 4


def test_the_bar_reads_metrics_at_the_end_of_epochs_only(monkeypatch):
    reads, steps = [], []

    class Spy(EpochBar):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            before = len(reads)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            steps.append((batch_idx, len(reads) > before, self._metrics.get("val/top1")))

    found = Trainer.progress_bar_metrics
    monkeypatch.setattr(Trainer, "progress_bar_metrics", property(lambda self: reads.append(1) or found.fget(self)))
    fit(Spy())
    # The last step comes before the validation of its epoch.
    assert [read for _, read, _ in steps] == [False, False, False, True] * 2
    assert [shown for _, _, shown in steps] == [None] * 4 + [0.5] * 4


def test_lines_are_for_pipes_and_the_bar_for_terminals(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(progress(), EpochLines)
    for stream in ("sys.stdout.isatty", "sys.stderr.isatty"):
        monkeypatch.setattr(stream, lambda: True)
    assert isinstance(progress(), EpochBar)
    assert isinstance(progress(bar=False), EpochLines)
