"""Random numbers as a pure function of the step, so that a resumed run draws what the uninterrupted one drew."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeeds(Callback):
    """Seeds the generators of Python, NumPy and torch before every training step from (seed, rank, epoch, batch).

    Dropout, stochastic depth, mixup and random tokenizers then differ between ranks and steps (Lightning seeds the main
    processes of all ranks alike), and no state of a generator needs to be saved.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators."""
        entropy = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        words = np.random.SeedSequence(entropy).generate_state(4)
        seed = int(words[0]) << 32 | int(words[1])
        # As torch.manual_seed does, without the 0.1 ms that it spends on devices that are not in use.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        if trainer.strategy.root_device.type == "mps":
            torch.mps.manual_seed(seed)
        np.random.seed(words[2])
        random.seed(int(words[3]))
