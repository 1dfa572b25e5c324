"""Exports a model: python -m fewtokens.runs.export checkpoint=<run> export.path=<file> [key=value ...]."""

from omegaconf import DictConfig

from fewtokens.runs.cli import command


def export(cfg: DictConfig) -> None:
    """One export."""
    from fewtokens.runs.exporting import run  # imports torch, which takes seconds, only once the config is known

    run(cfg)


if __name__ == "__main__":
    command("export", export)
