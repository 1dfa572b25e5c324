"""A training run: build, load the weights to start from, fit, test the best checkpoint, measure, report."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from fewtokens.callbacks.signals import Stopped
from fewtokens.errors import FewtokensError, check, check_choice, first_line
from fewtokens.runs import checkpoints, job, skipped_videos, teacher
from fewtokens.runs.compose import AUTO, checkpoint_of, run_to_resume
from fewtokens.runs.config import instantiate
from fewtokens.runs.distributed import child_processes_run_this_job, is_rank_zero, requeue
from fewtokens.runs.job import Job

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, float]:
    """Train and evaluate a model.

    Args:
        cfg: The composed config. `resume` names a run to continue, or is "auto": the one in the run directory, if there
            is one. `init_from` names a run whose weights to start from.

    Returns:
        The numbers of report.json (on rank 0).
    """
    if cfg.resume == AUTO:
        cfg.resume = run_to_continue(Path(HydraConfig.get().runtime.output_dir))
        try:
            return run(cfg)
        except Stopped:
            requeue()
            raise
    if cfg.init_from is not None and cfg.resume is None:  # before data are listed, which can take minutes
        checkpoint_of(cfg.init_from)
    with job.running(cfg) as parts:
        check_length(cfg.trainer)
        set_global_batch(parts)
        check(isinstance(cfg.test, bool), "test", "true or false", cfg.test)
        checkpoint, numbers = load_start_weights(cfg, parts.task)
        parts.record.numbers |= numbers | teacher.connect(cfg, parts.task, parts.data)
        with child_processes_run_this_job(parts.directory, parts.trainer):
            with skipped_videos.written_on_failure(parts):
                numbers = fit(parts, checkpoint)
                if cfg.test:
                    numbers |= test(parts)
            numbers |= skipped_videos.summarize(parts, numbers)
            measured, measures = job.measure(parts)
            numbers |= measured
            job.finish(parts, numbers, measures)
    return numbers


def run_to_continue(directory: Path) -> str | None:
    """Return the run directory if it contains a run with a checkpoint, which `resume=auto` continues, or None."""
    return str(directory) if (directory / "checkpoints" / "last.ckpt").is_file() else None


def optimized(cfg: DictConfig, numbers: dict[str, float]) -> float | None:
    """Return the number of a run that `optimized_metric` names, on rank 0 if it names one.

    Raises:
        FewtokensError: The run has no such number.
    """
    if cfg.optimized_metric is None or not is_rank_zero():
        return None
    check_choice("optimized_metric", cfg.optimized_metric, sorted(numbers))
    return numbers[cfg.optimized_metric]


def check_length(trainer: DictConfig) -> None:
    """Raise an error for settings with which Lightning trains nothing, or as long as it likes, and does not say so."""
    epochs, steps, batches = trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches
    accumulated = trainer.accumulate_grad_batches
    check(accumulated >= 1, "trainer.accumulate_grad_batches", "an int >= 1", accumulated)
    limited = steps != -1 if epochs is None else epochs == -1 or epochs >= 1  # Lightning's default is 1000 epochs
    check(limited, "trainer.max_epochs", "an int >= 1, -1 for no limit, or null with trainer.max_steps", epochs)
    check(steps == -1 or steps >= 1, "trainer.max_steps", "an int >= 1, or -1 for no limit", steps)
    valid = batches is None or (batches >= 1 if isinstance(batches, int) else 0 < batches <= 1)
    check(valid, "trainer.limit_train_batches", "an int >= 1, a share in (0, 1], or null for all", batches)
    every, interval, clip = trainer.check_val_every_n_epoch, trainer.val_check_interval, trainer.gradient_clip_val
    check(every is None or every >= 1, "trainer.check_val_every_n_epoch", "an int >= 1 or null", every)
    valid = interval is None or isinstance(interval, str) or interval > 0  # a text is a time: "00:00:30:00"
    check(valid, "trainer.val_check_interval", "a share in (0, 1], an int >= 1, a time or null", interval)
    sanity, log_every = trainer.num_sanity_val_steps, trainer.log_every_n_steps
    check(sanity >= -1, "trainer.num_sanity_val_steps", "an int >= 0, or -1 for all", sanity)
    check(log_every >= 0, "trainer.log_every_n_steps", "an int >= 1, or 0 for never", log_every)
    check(clip is None or clip >= 0, "trainer.gradient_clip_val", "a number >= 0 or null", clip)


def set_global_batch(parts: Job) -> None:
    """Derive the accumulation of gradients from `trainer.global_batch_size`, and print what an optimizer step reads."""
    cfg, trainer, size = parts.cfg, parts.trainer, parts.cfg.data.batch_size
    processes, total = trainer.num_nodes * trainer.num_devices, cfg.trainer.get("global_batch_size")
    if total is not None:
        multiple = f"a multiple of {processes * size} ({processes} process(es) x data.batch_size={size})"
        check(isinstance(total, int) and total > 0 and total % (processes * size) == 0,
              "trainer.global_batch_size", multiple, total)  # fmt: skip
        accumulated = cfg.trainer.accumulate_grad_batches
        check(accumulated == 1, "trainer.accumulate_grad_batches", "1 with trainer.global_batch_size", accumulated)
        trainer.accumulate_grad_batches = total // (processes * size)
    if trainer.is_global_zero:
        accumulated = trainer.accumulate_grad_batches
        print(
            f"{processes} process(es) x {size} samples x {accumulated} batch(es) = {processes * size * accumulated} "
            f"samples per optimizer step, learning rate {cfg.optimizer.get('lr')}"
        )


def load_start_weights(cfg: DictConfig, task: LightningModule) -> tuple[Path | None, dict[str, float]]:
    """Load the weights of another run (`init_from`) or of an image model (`init_image`), if the config names one.

    Returns:
        The checkpoint to resume from, which contains its weights, or None; and how many parameters were loaded.
    """
    numbers: dict[str, float] = {}
    # `init_image=none` after an experiment that sets init_image.weights leaves a node without a target.
    image = cfg.init_image if "_target_" in cfg.init_image else None
    if cfg.resume is not None:
        path = run_to_resume(cfg.resume)
        checkpoints.load_model(task, path)  # the same error as elsewhere, if it does not fit
        return path, numbers
    if cfg.init_from is not None and image is not None:
        raise FewtokensError(
            f"A model can start from one set of weights only, got init_from={cfg.init_from} and "
            f"init_image.weights={image.weights}. Use init_image=none or init_from=null."
        )
    if cfg.init_from is not None:
        numbers |= checkpoints.start_from(task, checkpoint_of(cfg.init_from))
    if image is not None:
        found = instantiate(image)(task.model)
        numbers |= {
            f"init_image/{name}": float(len(getattr(found, name))) for name in ("loaded", "missing", "unexpected")
        }
    return None, numbers


def fit(parts: Job, checkpoint: Path | None) -> dict[str, float]:
    """Train, from a checkpoint if there is one.

    Returns:
        `train/seconds`, `train/epochs`, `val/*` of the last epoch, and the numbers of the weights to start from.
    """
    try:
        parts.trainer.fit(parts.task, parts.data, ckpt_path=checkpoint, weights_only=True)
    except Exception as error:
        if checkpoint is None or parts.record.has_begun or isinstance(error, FewtokensError):
            raise
        raise FewtokensError(
            f"{checkpoint} cannot be resumed with these settings: {type(error).__name__}: {first_line(error)}. Remove "
            "overrides that change the optimizer or the trainer, or start from its weights with init_from."
        ) from error
    if checkpoint is not None and not parts.record.has_begun:
        log.warning(
            "Nothing is left to train: the run has reached trainer.max_epochs=%s or trainer.max_steps=%s. It is tested "
            "again; to train on, raise trainer.max_epochs.",
            parts.cfg.trainer.max_epochs,
            parts.cfg.trainer.max_steps,
        )
    parts.run.begin()  # unless training did it: a finished run that is resumed has nothing to train
    return parts.record.numbers | {"train/epochs": float(parts.trainer.current_epoch)}


def test(parts: Job) -> dict[str, float]:
    """Test the weights with the best validation loss, or the last ones if there was no validation.

    Returns:
        The metrics `test/*`.
    """
    best = parts.directory / "checkpoints" / "best.ckpt"
    parts.trainer.strategy.barrier()  # rank 0 may still be writing it
    if best.is_file():
        checkpoints.load_model(parts.task, best)
    parts.trainer.test(parts.task, parts.data, verbose=False)
    return parts.metrics("test/")
