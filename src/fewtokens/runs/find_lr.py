"""Finds a learning rate with Lightning's tuner: python -m fewtokens.runs.find_lr [group=option ...]."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from fewtokens.errors import FewtokensError, check
from fewtokens.runs.cli import command

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer


def find(cfg: DictConfig) -> float:
    """Print and return the learning rate at which the loss falls fastest, and draw the curve into `find_lr.png`.

    Raises:
        FewtokensError: A setting is out of range, or the losses suggest nothing.
    """
    from lightning.pytorch.tuner import Tuner

    options = cfg.find
    check(
        0 < options.lowest < options.highest, "find.lowest", "a number above 0 and below find.highest", options.lowest
    )
    check(options.steps >= 20, "find.steps", "an int >= 20, since the first ten steps are not used", options.steps)
    trainer, task, data = to_tune(cfg)
    found = Tuner(trainer).lr_find(
        task, datamodule=data, min_lr=float(options.lowest), max_lr=float(options.highest), num_training=options.steps,
        early_stop_threshold=options.stop_at, update_attr=False,
    )  # fmt: skip
    rate = None if found is None else found.suggestion()
    if found is None or rate is None:
        raise FewtokensError("The losses suggest no learning rate. Set find.steps higher or find.lowest lower.")
    path = Path(cfg.paths.run) / "find_lr.png"
    figure = found.plot(suggest=True)
    assert figure is not None
    figure.savefig(path)
    print(f"Picture: {path}\nThe loss falls fastest at optimizer.lr={rate:.2g}")
    return float(rate)


def to_tune(cfg: DictConfig) -> "tuple[Trainer, LightningModule, LightningDataModule]":
    """Return trainer, task and data of a job, without loggers, and without callbacks other than `callbacks.freeze`.

    The weights are those with which the job would start, and the task has its teacher.

    Raises:
        FewtokensError: The trainer has several processes, for which Lightning's tuner was not made.
    """
    from fewtokens.runs import teacher
    from fewtokens.runs.config import check_groups, instantiate
    from fewtokens.runs.job import build_trainer, start
    from fewtokens.runs.train import load_start_weights

    devices = cfg.trainer.devices
    check(devices in (1, "1") and cfg.trainer.num_nodes == 1, "trainer.devices", "1 to find settings", devices)
    start(cfg)
    check_groups(cfg)
    Path(cfg.paths.run).mkdir(parents=True, exist_ok=True)
    parts = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer, task, data = build_trainer(cfg.trainer, **parts), instantiate(cfg.task), instantiate(cfg.data)
    load_start_weights(cfg, task)
    teacher.connect(cfg, task, data)
    if cfg.callbacks.get("freeze") is not None:
        instantiate(cfg.callbacks.freeze).setup(trainer, task, "fit")  # the tuner removes all callbacks
    return trainer, task, data


if __name__ == "__main__":
    command("find_lr", find)
