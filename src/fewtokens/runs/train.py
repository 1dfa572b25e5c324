"""A training run: fit, test the best checkpoint, measure, report."""

import time
from pathlib import Path

from omegaconf import DictConfig

from fewtokens.callbacks.loggers import CsvLogger
from fewtokens.errors import FewtokensError
from fewtokens.runs import checkpoints, job, skipped_videos
from fewtokens.runs import config as saved
from fewtokens.runs.distributed import one_job, override
from fewtokens.runs.targets import instantiate


def run(cfg: DictConfig) -> dict[str, float]:
    """Train as the config says.

    Args:
        cfg: The composed config; `resume` names a run to continue, `init_from` one whose weights to start with.

    Returns:
        The numbers of report.json (on rank 0).
    """
    parts, ok = None, False
    try:
        parts = job.build(cfg)
        start = _resume(cfg, parts)
        numbers = _init(cfg, parts) | _init_image(cfg, parts)
        with one_job(parts.directory, [override("resume", cfg.resume)]):
            began = time.monotonic()
            parts.trainer.fit(parts.task, parts.data, ckpt_path=start, weights_only=True)
            numbers |= {"train/seconds": time.monotonic() - began, "train/epochs": float(parts.trainer.current_epoch)}
            numbers |= _numbers(parts, "val/")
            if cfg.test:
                _load_best(parts)
                parts.trainer.test(parts.task, parts.data, verbose=False)
                numbers |= _numbers(parts, "test/")
            numbers |= skipped_videos.summarize(parts, numbers)
            more, pictures = job.measure(parts)
            job.finish(parts, numbers | more, pictures)
        ok = True
        return numbers | more
    finally:
        job.close(parts, ok)


def _resume(cfg: DictConfig, parts: job.Job) -> Path | None:
    """The checkpoint to continue from, with the csv file cut back to it."""
    if cfg.resume is None:
        return None
    path = Path(cfg.resume) / "checkpoints" / "last.ckpt"
    if not path.is_file():
        raise FewtokensError(
            "A run is resumed from its last checkpoint",
            expected=path,
            got="no such file",
            fix="start it anew; it ended before its first epoch",
        )
    step = int(checkpoints.read(path)["global_step"])
    for logger in parts.loggers:
        if isinstance(logger, CsvLogger):
            logger.rewind(step)
    return path


def _init(cfg: DictConfig, parts: job.Job) -> dict[str, float]:
    """Weights of another run to start from; a resumed run has its own."""
    if cfg.init_from is None or cfg.resume is not None:
        return {}
    if _has_image(cfg):
        raise FewtokensError(
            "A model starts from one set of weights",
            expected="init_from (a run of the same kind) or init_image (an image model for a video model)",
            got=f"init_from={cfg.init_from} and init_image={cfg.init_image.weights}",
            fix="leave one of them out",
        )
    return checkpoints.start_from(parts.task, saved.checkpoint_of(cfg.init_from))


def _init_image(cfg: DictConfig, parts: job.Job) -> dict[str, float]:
    """An image model for a video model to start from; a resumed run has weights of its own."""
    if not _has_image(cfg) or cfg.resume is not None:
        return {}
    started = instantiate(cfg.init_image)(parts.task.model)
    names = ("loaded", "missing", "unexpected")
    return {f"init_image/{name}": float(len(getattr(started, name))) for name in names}


def _has_image(cfg: DictConfig) -> bool:
    """Not so where `init_image=none` took the recipe away and left the weights that an experiment names."""
    return bool(cfg.init_image) and "_target_" in cfg.init_image


def _load_best(parts: job.Job) -> None:
    """The best weights by validation, where there was one; otherwise the last."""
    folder = parts.directory / "checkpoints"
    best = folder / "best.ckpt"
    parts.trainer.strategy.barrier()
    if best.is_file():
        checkpoints.load_model(parts.task, best)


def _numbers(parts: job.Job, prefix: str) -> dict[str, float]:
    return {k: float(v) for k, v in parts.trainer.callback_metrics.items() if k.startswith(prefix)}
