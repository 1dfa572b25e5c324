"""Evaluate a model once: python eval.py checkpoint=<run> [group=option ...] [key=value ...]."""

from omegaconf import DictConfig

from fewtokens.runs.cli import command


def evaluate(cfg: DictConfig) -> None:
    """Run one evaluation."""
    from fewtokens.runs.eval import run  # imports torch, which takes seconds, so only after the config is composed

    run(cfg)


if __name__ == "__main__":
    command("eval", evaluate)
