"""Trains a model and evaluates it: python train.py [group=option ...] [key=value ...]."""

from fewtokens.runs.cli import command
from omegaconf import DictConfig


def train(cfg: DictConfig) -> None:
    """One training run."""
    from fewtokens.runs.train import run  # imports torch, which takes seconds, only once the config is known

    run(cfg)


if __name__ == "__main__":
    command("train", train)
