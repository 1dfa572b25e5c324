"""Train a model and evaluate it: python train.py [group=option ...] [key=value ...]."""

from omegaconf import DictConfig

from fewtokens.runs.cli import command


def train(cfg: DictConfig) -> float | None:
    """Run one training, and return the number that a sweeper optimizes."""
    # Imports torch, which takes seconds, so only after the config is composed.
    from fewtokens.runs.train import optimized, run

    return optimized(cfg, run(cfg))


if __name__ == "__main__":
    command("train", train)
