"""Handling of SIGTERM and SIGUSR1: save at the end of a step, then exit with a nonzero code."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Training was stopped by a signal, and the checkpoint to resume from has been written."""


class StopOnSignal(Checkpoint):
    """Saves `last.ckpt` at the end of the step in which any rank received SIGTERM or SIGUSR1, and stops all ranks.

    Lightning's handler saves nothing, broadcasts inside the handler and exits with code 0. This one only sets a flag in
    the handler, and exits with 128 plus the number of the signal. It is a `Checkpoint` because Lightning calls those
    last: the saved state must include what other callbacks, such as an average of the weights, do after the step.

    Args:
        path: Path of the checkpoint.
        ask_every: With several processes, number of batches after which they tell each other whether a signal was
            received. This waits for the device, which would slow down every step. A single process checks the flag
            after every batch.
    """

    def __init__(self, path: str, ask_every: int = 10) -> None:
        self.path, self.ask_every = Path(path), ask_every
        self.received = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which Lightning restores when training ends."""
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._receive)
        except ValueError:  # Python allows handlers in the main thread only; notebooks and launchers may use another
            log.warning("Signals are not caught: training does not run in the main thread")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop on all ranks if one of them received a signal."""
        skip = not self.received if trainer.world_size == 1 else batch_idx % self.ask_every > 0
        if skip or not trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            return
        trainer.save_checkpoint(self.path)
        number = self.received or int(signal.SIGTERM)
        log.warning(
            "Stopped by signal %d after step %d. Continue with resume=%s",
            number,
            trainer.global_step,
            self.path.parent.parent,
        )
        raise Stopped(self._exit_code(trainer, number))

    def _exit_code(self, trainer: Trainer, number: int) -> int:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_lightning = trainer.global_rank > 0 and environment and not environment.creates_processes_externally
        # Lightning's launcher kills rank 0 if a child process fails, so only rank 0 exits with a nonzero code.
        return 0 if started_by_lightning else 128 + number

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
