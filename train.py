"""Train a model and evaluate it: python train.py [group=option ...] [key=value ...]."""

from omegaconf import DictConfig

from fewtokens.runs.cli import command


def train(cfg: DictConfig) -> None:
    """Run one training."""
    from fewtokens.runs.train import run  # imports torch, which takes seconds, so only after the config is composed

    run(cfg)


if __name__ == "__main__":
    command("train", train)
