"""An evaluation: the test set once, the measures, the report."""

import logging

from omegaconf import DictConfig
from torch import nn

from fewtokens.runs import checkpoints, job, skipped_videos
from fewtokens.runs import config as saved
from fewtokens.runs.distributed import one_job, override

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate as the config says.

    Args:
        cfg: The composed config: the run's own, with overrides on top; `checkpoint` names the run or file, or is null
            for a model as it is configured.

    Returns:
        The numbers of report.json (on rank 0).
    """
    parts, ok = None, False
    try:
        parts = job.build(cfg)
        load_weights(cfg, parts.task)
        with one_job(parts.directory, [override("checkpoint", cfg.checkpoint)]):
            parts.trainer.test(parts.task, parts.data, verbose=False)
            metrics = parts.trainer.callback_metrics.items()
            numbers = {name: float(value) for name, value in metrics if name.startswith("test/")}
            numbers |= skipped_videos.summarize(parts, numbers)
            more, pictures = job.measure(parts)
            job.finish(parts, numbers | more, pictures)
        ok = True
        return numbers | more
    finally:
        job.close(parts, ok)


def load_weights(cfg: DictConfig, task: nn.Module) -> None:
    """Put the weights of `checkpoint` into the task's model; without one, say so if they are random."""
    if cfg.checkpoint is not None:
        checkpoints.load_model(task, saved.checkpoint_of(cfg.checkpoint))
    elif not cfg.backbone.get("pretrained") and not cfg.backbone.get("weights"):
        log.warning("No checkpoint=<run>, backbone.pretrained or backbone.weights: the weights are random")
