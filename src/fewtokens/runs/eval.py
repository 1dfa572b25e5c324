"""An evaluation: build, load the weights, test, measure, report."""

import logging

from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from fewtokens.runs import checkpoints, job, skipped_videos
from fewtokens.runs.compose import checkpoint_of
from fewtokens.runs.distributed import child_processes_run_this_job

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate a model on the test set.

    Args:
        cfg: The composed config. `checkpoint` names the run whose config it is based on, or is null for a model as
            configured.

    Returns:
        The numbers of report.json (on rank 0).
    """
    with job.running(cfg) as parts:
        load_weights(cfg, parts.task)
        with child_processes_run_this_job(parts.directory, parts.trainer):
            with skipped_videos.written_on_failure(parts):
                parts.trainer.test(parts.task, parts.data, verbose=False)
            numbers = parts.metrics("test/")
            numbers |= skipped_videos.summarize(parts, numbers)
            measured, measures = job.measure(parts)
            numbers |= measured
            job.finish(parts, numbers, measures)
    return numbers


def load_weights(cfg: DictConfig, task: LightningModule) -> None:
    """Load the weights of `checkpoint` into the model, or log a warning if its weights are random."""
    if cfg.checkpoint is not None:
        checkpoints.load_model(task, checkpoint_of(cfg.checkpoint))
    elif not cfg.backbone.get("pretrained") and not cfg.backbone.get("weights"):
        log.warning("The weights are random, without checkpoint=<run>, backbone.pretrained or backbone.weights")
