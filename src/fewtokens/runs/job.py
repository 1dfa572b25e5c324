"""A job of training or evaluation, which is built from a config, measured and reported."""

import copy
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, open_dict
from PIL import Image
from torch import Tensor

from fewtokens.analysis.evaluation import load_test_images, measured_on, random_images, unwrap_compiled
from fewtokens.backbones.vit import ViT
from fewtokens.callbacks.last_checkpoint import LastCheckpoint
from fewtokens.callbacks.loggers import WandbRun, log_table
from fewtokens.callbacks.pictures import log_picture, log_video
from fewtokens.callbacks.pruning import trial_of_environment
from fewtokens.data.workers import lost_worker
from fewtokens.errors import FewtokensError, check, check_choice
from fewtokens.runs import config, extras, fsdp, report
from fewtokens.runs.checkpoints import AtomicCheckpointIO
from fewtokens.runs.config import instantiate
from fewtokens.runs.directory import RunDirectory, TrainingRecord
from fewtokens.runs.distributed import end_children, end_process_group, lost_process
from fewtokens.runs.pages import run_page
from fewtokens.tokenizers.base import Tokenizer


@dataclass
class Job:
    """The parts of a run.

    Args:
        cfg: The composed config.
        run: Directory of the run, locked.
        data: The datamodule.
        task: The LightningModule.
        trainer: The trainer, with its callbacks and loggers.
        record: The callback that records the training.
    """

    cfg: DictConfig
    run: RunDirectory
    data: LightningDataModule
    task: LightningModule
    trainer: Trainer
    record: TrainingRecord

    @property
    def directory(self) -> Path:
        """Return the path of the run directory."""
        return self.run.path

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the metrics of the trainer whose names start with `prefix`."""
        return {name: float(v) for name, v in self.trainer.callback_metrics.items() if name.startswith(prefix)}


@contextmanager
def running(cfg: DictConfig) -> Iterator[Job]:
    """Return a context with the parts of a run, in its locked directory. At the end, loggers are closed.

    Args:
        cfg: The composed config.
    """
    extras.apply(cfg)
    with _page_of_a_failure(RunDirectory(cfg)) as run:
        loggers: list[Logger] = []
        job, status = None, "failed"
        try:
            job = build(cfg, run)
            loggers = job.trainer.loggers
            yield job
            status = "success"
        except Exception as error:
            if job is None:
                raise
            reason = lost_process(job.trainer, error) or lost_worker(error)
            end_children(job.trainer)
            if reason is None:
                raise
            raise FewtokensError(f"{reason} Continue with resume={run.path}") from error
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
                raise KeyboardInterrupt from None
            raise
        finally:
            for logger in loggers:
                logger.finalize(status)
            _finish_wandb(status)


@contextmanager
def _page_of_a_failure(directory: RunDirectory) -> Iterator[RunDirectory]:
    """Return the context of a run directory, which writes the page of a run that stops or fails, too."""
    try:
        with directory as run:
            yield run
    except BaseException:
        if directory.begun:
            with suppress(Exception):  # the error that ended the run is the one to report
                run_page.write(directory.path)
        raise


def start(cfg: DictConfig) -> None:
    """Seed all random number generators and keep libraries from printing more than errors and warnings."""
    valid = isinstance(cfg.seed, int) and 0 <= cfg.seed < 2**32
    check(valid, "seed", "an int from 0 to 2^32 - 1", cfg.seed)
    _quiet()
    seed_everything(cfg.seed, workers=True, verbose=False)


def build(cfg: DictConfig, run: RunDirectory) -> Job:
    """Build the parts of a run.

    Args:
        cfg: The composed config.
        run: Directory of the run.
    """
    start(cfg)
    config.check_groups(cfg)
    precision = cfg.trainer.precision  # Lightning's others convert the weights, but not the samples
    supported = precision is None or str(precision) in ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")
    check(supported, "trainer.precision", "32-true, bf16-mixed or 16-mixed", precision)
    data, task = instantiate(cfg.data), instantiate(cfg.task)
    record = TrainingRecord(run)
    callbacks, loggers = [*_objects(cfg, "callbacks"), *trial_of_environment(), record], _objects(cfg, "logger")
    fsdp.check_settings(cfg.trainer, callbacks)
    if cfg.trainer.enable_progress_bar is False:  # Lightning refuses one that is configured
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    if not loggers:  # Lightning refuses to monitor the learning rate without a logger
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    _check_checkpoint_files(callbacks)
    trainer = build_trainer(cfg.trainer, callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO()])
    resolved = config.plain(cfg, resolve=True)
    for logger in loggers:
        if isinstance(logger, WandbRun):
            logger.describe(list(cfg.tags), task.model)
        # The names of the options, to filter by: `choices.tokenizer`.
        logger.log_hyperparams({**resolved, "choices": run.choices})
    return Job(cfg, run, data, task, trainer, record)


def build_trainer(node: DictConfig, **parts: Any) -> Trainer:
    """Build Lightning's Trainer, after setting the precision of float32 matrix products, which is global in torch.

    Args:
        node: `trainer` of the config. Its `float32_matmul_precision` and `global_batch_size` are no arguments of the
            Trainer.
        parts: Further arguments of the Trainer.
    """
    settings = copy.copy(node)
    with open_dict(settings):
        precision = settings.pop("float32_matmul_precision", "highest")
        settings.pop("global_batch_size", None)  # depends on the number of processes, see `fewtokens.runs.train`
    check_choice("trainer.float32_matmul_precision", precision, ("highest", "high", "medium"))
    deterministic = settings.get("deterministic", False)  # Lightning ignores other words
    check(isinstance(deterministic, bool) or deterministic == "warn", "trainer.deterministic", "true, false or warn",
          deterministic)  # fmt: skip
    kinds = {"cuda": (CUDAAccelerator,), "gpu": (CUDAAccelerator, MPSAccelerator)}.get(settings.get("accelerator"))
    if kinds is not None and not any(kind.is_available() for kind in kinds):
        raise FewtokensError(
            f"trainer.accelerator={settings.accelerator} needs a GPU, but torch finds none on this machine. Use "
            "trainer=cpu, or check the driver with: python -c 'import torch; torch.zeros(1).cuda()'"
        )
    torch.set_float32_matmul_precision(precision)
    return instantiate(settings, **parts)


def _objects(cfg: DictConfig, group: str) -> list[Any]:
    """Return the objects of a group of several, without those that are null."""
    for name, node in cfg[group].items():
        valid = node is None or (isinstance(node, DictConfig) and (not node or "_target_" in node))
        check(valid, f"{group}.{name}", "null, or values with a _target_", node)
    return [instantiate(node) for node in cfg[group].values() if node]


def _check_checkpoint_files(callbacks: list[Any]) -> None:
    """Raise an error if two callbacks would write the same checkpoint."""
    files: list[Path] = [callback.path for callback in callbacks if isinstance(callback, LastCheckpoint)]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            names = [callback.filename] if callback.filename else []
            names += [callback.CHECKPOINT_NAME_LAST] if callback.save_last else []
            files += [Path(callback.dirpath, name).with_name(f"{Path(name).name}.ckpt") for name in names]
    resolved = [file.resolve() for file in files]
    if twice := [str(file) for file in files if resolved.count(file.resolve()) > 1]:
        raise FewtokensError(
            f"Two callbacks would write {twice[0]}, and one would overwrite what the other saves. Give the checkpoints "
            "different names: callbacks.best.filename is the one with the best validation loss, callbacks.last.path "
            "the one to resume from."
        )


def load_images(cfg: DictConfig, task: LightningModule, source: str, count: int) -> Float[Tensor, "b c *t h w"]:
    """Return images or clips on the task's device.

    Args:
        cfg: The composed config.
        task: The task, for whose model they are.
        source: "test" for the first of the test set, or "random", which needs no data.
        count: Number of images; fewer are returned if the test set is smaller.
    """
    if source == "random":
        return random_images(unwrap_compiled(task.model), count, cfg.seed).to(task.device)
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("test")
    return load_test_images(task, data, count)


def measure(job: Job) -> tuple[dict[str, float], list[Any]]:
    """Run all measures of the config on rank 0, which may take long. The process group ends before.

    Returns:
        Their numbers, and the measures, which may have a `picture`, a `video`, their `caption`, and a `table`.
    """
    numbers: dict[str, float] = {}
    end_process_group(job.trainer)
    if not job.trainer.is_global_zero:
        return numbers, []
    with measured_on(job.task, job.trainer.strategy.root_device):
        measures = _objects(job.cfg, "measure")
        for part in measures:
            numbers |= part(job.task, job.data, job.directory)
    return numbers, measures


def finish(job: Job, numbers: dict[str, float], measures: list[Any]) -> None:
    """Write the report and its page, log its numbers, pictures and tables, and print a table."""
    if not job.trainer.is_global_zero:
        return
    pictures = {
        path: str(getattr(part, "caption", ""))
        for part in measures
        for name in ("picture", "video")
        if (path := getattr(part, name, None))
    }
    report.write(numbers, job.directory)
    job.run.finish(measured_on=report.device_name(job.trainer.strategy.root_device))
    for logger in job.trainer.loggers:
        for part in measures:
            if getattr(part, "table", None) is not None:
                log_table(logger, "test/predictions", part.table)
        _log_report(logger, numbers, pictures, job.trainer.global_step)
    page = run_page.write(job.directory)
    report.print_table(numbers, job.directory, list(pictures), method_name(unwrap_compiled(job.task.model)))
    print(f"Page: {page}")


def method_name(model: ViT) -> str | None:
    """Return the name of the class that reduces the tokens of a model, or None for the plain transformer."""
    used = [type(tokenizer) for tokenizer in model.encoder.tokenizers if type(tokenizer) is not Tokenizer]
    return used[0].__name__ if used else None


def _log_report(logger: Logger, numbers: dict[str, float], pictures: dict[Path, str], step: int) -> None:
    summary = getattr(getattr(logger, "experiment", None), "summary", None)
    if summary is not None:  # W&B keeps final numbers apart from the curves
        summary.update(numbers)
    else:
        logger.log_metrics(numbers, step=step)
    for picture, caption in pictures.items():
        if picture.suffix == ".gif":
            log_video(logger, f"test/{picture.stem}_video", picture, step, caption)
        else:
            log_picture(logger, f"test/{picture.stem}", np.asarray(Image.open(picture).convert("RGB")), step, caption)
    logger.save()


def _finish_wandb(status: str) -> None:
    """End the W&B run, if there is one, so that the next job of a sweep starts its own."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=0 if status == "success" else 1)


def _quiet() -> None:
    # It says which process died when Lightning kills the others.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()  # Hydra's handlers print the messages a second time
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # it logs the profile
    for message in (
        ".*LeafSpec.*",
        ".*does not have many workers.*",  # data in memory needs none
        ".*recommended to use .*sync_dist.*",  # torchmetrics has synchronized the value already
        ".*smaller than the logging interval.*",
        ".*`srun` command is available on your system but is not used.*",  # as on the login node of a cluster
        ".*WeightAveraging callback with a model that overrides.*",  # only FSDP shards, which refuses the callback
        ".*Total length of `list` across ranks is zero.*",  # a data set without a validation part
        ".*Checkpoint directory .* exists and is not empty.*",  # it is not when a run resumes
    ):
        warnings.filterwarnings("ignore", message=message)
