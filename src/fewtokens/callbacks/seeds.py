"""Random numbers as a pure function of the step, so that a resumed run draws what the uninterrupted one drew."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeeds(Callback):
    """Seeds Python's, NumPy's and torch's generators before every training step from (seed, rank, epoch, batch).

    Dropout, stochastic depth, mixup and random tokenizers then differ between ranks and steps (Lightning seeds the
    main process of every rank alike), and no generator's state need be saved.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        entropy = (self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)
        words = np.random.SeedSequence(entropy).generate_state(4)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2])
        random.seed(int(words[3]))
