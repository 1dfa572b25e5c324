"""Checkpoints within epochs: when they are written, and that a killed run continues from them exactly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from conftest import TINY
from fewtokens.callbacks.last_checkpoint import LastCheckpoint
from fewtokens.errors import FewtokensError
from fewtokens.runs import train as training
from fewtokens.tasks.classification import Classifier

# Two epochs of five batches, whose gradients are accumulated over two; all sources of randomness
RUN = [
    *TINY,
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=5",
    "trainer.accumulate_grad_batches=2",
    "backbone.options.proj_drop_rate=0.1",
    "backbone.options.drop_path_rate=0.1",
    "task.mix.mixup=0.8",
    "callbacks=ema",
    "test=false",
]


class Killed(Exception):
    """Stands for the end of the process."""


def weights(run: Path) -> dict[str, torch.Tensor]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"] | {f"now.{name}": value for name, value in content["current_model_state"].items()}


@pytest.mark.parametrize("setting", ["every_n_train_steps=1", "every_minutes=1e-6"])
def test_a_run_killed_within_an_epoch_continues_exactly(composed, tmp_path: Path, monkeypatch, setting: str) -> None:
    run, saved, seen = tmp_path / "run", [], []
    save = Trainer.save_checkpoint

    def spy(trainer: Trainer, path: Any, *args: Any) -> None:
        save(trainer, path, *args)
        if Path(path).name == "last.ckpt":
            saved.append((trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready))

    monkeypatch.setattr(Trainer, "save_checkpoint", spy)
    overrides = [*RUN, f"callbacks.last.{setting}"]
    numbers = training.run(composed(*overrides))
    # after two and four batches, which make a step, and at the end of the epoch
    assert saved == [(0, 2), (0, 4), (0, 5), (1, 2), (1, 4), (1, 5)]
    whole = weights(run)
    shutil.rmtree(run)

    def killed(task: Classifier, batch: Any, index: int) -> None:
        seen.append(index)
        if len(seen) == 9:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Classifier, "on_train_batch_start", killed, raising=False)
        training.run(composed(*overrides))
    assert saved[6:] == [(0, 2), (0, 4), (0, 5), (1, 2)]
    del saved[:]
    again = training.run(composed(f"resume={run}"))
    assert saved == [(1, 4), (1, 5)]
    assert weights(run).keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in weights(run).items())
    assert {k: v for k, v in again.items() if k != "train/seconds"} == {
        k: v for k, v in numbers.items() if k != "train/seconds"
    }


def test_settings_that_cannot_be_are_refused() -> None:
    for setting in ({"every_n_train_steps": 0}, {"every_minutes": 0.0}, {"ask_every": 0}):
        with pytest.raises(FewtokensError, match=f"callbacks.last.{next(iter(setting))}"):
            LastCheckpoint("last.ckpt", **setting)


@pytest.mark.parametrize(("data", "minutes"), [("kinetics400", 30), ("kinetics600", 30), ("imagenet", None)])
def test_kinetics_saves_every_half_hour(composed, data: str, minutes: int | None) -> None:
    assert composed(f"data={data}").callbacks.last.every_minutes == minutes
