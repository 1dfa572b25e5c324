"""What training and evaluation share: the parts of a job, built from its config."""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image

from fewtokens.callbacks.pictures import log_picture, log_video
from fewtokens.runs import config as saved
from fewtokens.runs import report
from fewtokens.runs.checkpoints import AtomicCheckpointIO, EmbedConfig
from fewtokens.runs.targets import instantiate

log = logging.getLogger(__name__)


@dataclass
class Job:
    """The parts of a job.

    Args:
        cfg: The composed config.
        directory: Of the run.
        data: The datamodule.
        task: The LightningModule.
        trainer: With callbacks and loggers.
    """

    cfg: DictConfig
    directory: Path
    data: LightningDataModule
    task: LightningModule
    trainer: Trainer

    @property
    def loggers(self) -> list[Logger]:
        """Of the trainer."""
        return self.trainer.loggers


def start(cfg: DictConfig) -> Path:
    """Save the config and seed all generators; the run directory."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    with open_dict(cfg):
        cfg.name = str(cfg.name)  # the choice that it refers to is not known to children and later evaluations
    if report.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        saved.save(cfg, directory)
        report.write_run(cfg, directory, status="started")
    _quiet()
    seed_everything(cfg.seed, workers=True, verbose=False)
    return directory


def build(cfg: DictConfig) -> Job:
    """Save the config and build everything that it describes."""
    directory = start(cfg)
    data, task = instantiate(cfg.data), instantiate(cfg.task)
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if node]
    callbacks.append(EmbedConfig(saved.plain(cfg)))
    loggers = [instantiate(node) for node in cfg.logger.values() if node]
    if not loggers:  # it refuses to run where nothing can be logged
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()])
    resolved = _resolved(cfg)
    for logger in loggers:
        logger.log_hyperparams(resolved)
    return Job(cfg, directory, data, task, trainer)


def measure(job: Job) -> tuple[dict[str, float], list[Path]]:
    """All measures of the config, on rank 0: their numbers, and the pictures and videos that they made."""
    numbers: dict[str, float] = {}
    pictures: list[Path] = []
    if not job.trainer.is_global_zero:
        return numbers, pictures
    training = job.task.training
    job.task.eval()
    for part in [instantiate(node) for node in job.cfg.measure.values() if node]:
        numbers |= part(job.task, job.data, job.directory)
        pictures += [path for name in ("picture", "video") if (path := getattr(part, name, None))]
    job.task.train(training)
    return numbers, pictures


def finish(job: Job, numbers: dict[str, float], pictures: list[Path]) -> None:
    """Write the report, tell the loggers, print the table."""
    if not job.trainer.is_global_zero:
        return
    report.write(numbers, job.directory)
    report.write_run(job.cfg, job.directory, status="finished")
    for logger in job.loggers:
        summary = getattr(getattr(logger, "experiment", None), "summary", None)
        if summary is not None:  # W&B keeps final numbers apart from the curves
            summary.update(numbers)
        else:
            logger.log_metrics(numbers, step=job.trainer.global_step)
        for picture in pictures:
            if picture.suffix == ".gif":
                log_video(logger, f"test/{picture.stem}_video", picture, job.trainer.global_step)
                continue
            pixels = np.asarray(Image.open(picture).convert("RGB"))
            log_picture(logger, f"test/{picture.stem}", pixels, job.trainer.global_step)
        logger.save()
    report.print_table(numbers, job.directory, pictures)


def close(job: Job | None, ok: bool) -> None:
    """Close what loggers hold open; on failure they say so, and the next job of a sweep gets a run of its own."""
    if job is not None:
        for logger in job.loggers:
            logger.finalize("success" if ok else "failed")
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=0 if ok else 1)


def _quiet() -> None:
    """Leave the screen to what the run has to say: no second handler, no advertisements, no notices about Lightning."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # in-memory data wants none
    warnings.filterwarnings("ignore", message=".*recommended to use .*sync_dist.*")  # torchmetrics has gathered it
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")  # resume


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    wanted = {key: cfg._get_node(key) for key in cfg if key not in saved.NOT_OF_THE_RUN}
    container = {
        k: OmegaConf.to_container(n, resolve=True) if OmegaConf.is_config(n) else cfg[k] for k, n in wanted.items()
    }
    masked = saved.masked(container)
    assert isinstance(masked, dict)
    return masked
