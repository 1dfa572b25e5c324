"""SIGTERM: save at a step boundary, then exit with a code that is not 0."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Training ended early on a signal; the checkpoint to resume from is written."""


class StopOnSignal(Checkpoint):
    """Saves `last.ckpt` at the end of the step in which SIGTERM or SIGUSR1 came to any rank, and stops all ranks.

    Lightning's own handler saves nothing, broadcasts inside the handler and exits with code 0. This one only sets a
    flag there. The exit code is 128 plus the signal's number. A `Checkpoint`, because Lightning calls these last: what
    it saves must hold what other callbacks (an average of the weights) do at the end of the step.

    Args:
        path: Where to save.
        ask_every: With several processes, batches between two questions to all of them whether a signal came: the
            answer waits for the device, which every step would feel. A single process looks after each batch.
    """

    def __init__(self, path: str, ask_every: int = 10) -> None:
        self.path, self.ask_every = Path(path), ask_every
        self.received = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers, which it puts back at its end."""
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._note)
        except ValueError:  # not the main thread (a notebook's executor, a launcher): no signals to catch
            log.warning("Signals are not caught: training does not run in the main thread")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask all ranks, save together, leave together."""
        quiet = not self.received if trainer.world_size == 1 else batch_idx % self.ask_every > 0
        if quiet:
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            return
        trainer.save_checkpoint(self.path)
        number = self.received or int(signal.SIGTERM)
        log.warning(
            "Stopped by signal %d after step %d; continue with resume=%s",
            number,
            trainer.global_step,
            self.path.parent.parent,
        )
        raise Stopped(self._exit_code(trainer, number))

    def _exit_code(self, trainer: Trainer, number: int) -> int:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_by_us = trainer.global_rank > 0 and environment and not environment.creates_processes_externally
        # Lightning's launcher kills rank 0 when a child fails, so only rank 0 says that the job was cut short.
        return 0 if started_by_us else 128 + number

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
