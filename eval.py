"""Evaluates a model once: python eval.py checkpoint=<run> [group=option ...] [key=value ...]."""

from fewtokens.runs.cli import command
from omegaconf import DictConfig


def evaluate(cfg: DictConfig) -> None:
    """One evaluation."""
    from fewtokens.runs.eval import run  # imports torch, which takes seconds, only once the config is known

    run(cfg)


if __name__ == "__main__":
    command("eval", evaluate)
