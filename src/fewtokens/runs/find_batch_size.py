"""Finds the largest batch size that fits, with Lightning's tuner: python -m fewtokens.runs.find_batch_size."""

from omegaconf import DictConfig

from fewtokens.errors import check, check_choice
from fewtokens.runs.cli import command
from fewtokens.runs.find_lr import to_tune


def find(cfg: DictConfig) -> int:
    """Print and return the largest batch size with which training steps fit into memory.

    Raises:
        FewtokensError: A setting is out of range.
    """
    from lightning.pytorch.tuner import Tuner

    options = cfg.find
    check_choice("find.mode", options.mode, ("power", "binsearch"))
    check(1 <= options.first <= options.highest, "find.first", "an int from 1 to find.highest", options.first)
    check(options.steps >= 1, "find.steps", "an int >= 1", options.steps)
    trainer, task, data = to_tune(cfg)
    size = Tuner(trainer).scale_batch_size(
        task, datamodule=data, mode=options.mode, steps_per_trial=options.steps, init_val=options.first,
        max_val=options.highest,
    )  # fmt: skip
    assert size is not None
    limit = " (the highest that was tried)" if size >= options.highest else ""
    print(f"Training fits with data.batch_size={size}{limit}")
    return int(size)


if __name__ == "__main__":
    command("find_batch_size", find)
