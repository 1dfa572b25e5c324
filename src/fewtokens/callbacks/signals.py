"""Handling of signals: save at the end of a step, then exit with a nonzero code."""

import logging
import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fewtokens.callbacks.last_checkpoint import has_stepped
from fewtokens.data.workers import SIGNALS
from fewtokens.errors import check

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Training was stopped by a signal, and the checkpoint to resume from has been written.

    Args:
        code: The exit code.
        number: Number of the signal.
    """

    def __init__(self, code: int, number: int) -> None:
        super().__init__(code)
        self.reason = f"stopped by {signal.Signals(number).name}"


class StopOnSignal(Checkpoint):
    """Saves `last.ckpt` at the end of the step in which any rank received a signal, and stops all ranks.

    After the last step of an epoch, the epoch is validated first.

    The signals are SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1. A second Ctrl-C ends the process at once.

    Lightning's handlers save nothing, and exit with code 0 (SIGTERM) or 1 (SIGINT). This one only sets a flag in the
    handler, and exits with 128 plus the number of the signal. It is a `Checkpoint` because Lightning calls those last:
    the saved state must include what other callbacks, such as an average of the weights, do after the step.

    Args:
        path: Path of the checkpoint.
        ask_every: With several processes, number of batches after which they tell each other whether a signal was
            received. This waits for the device, which would slow down every step. A single process checks the flag
            after every batch.
    """

    def __init__(self, path: str, ask_every: int = 10) -> None:
        check(ask_every >= 1, "callbacks.stop.ask_every", "an int >= 1", ask_every)
        self.path, self.ask_every = Path(path), ask_every
        self.received, self._stopping = 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which Lightning restores when training ends."""
        try:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup, or in the background of a script
                    signal.signal(number, self._receive)
        except ValueError:  # Python allows handlers in the main thread only; notebooks and launchers may use another
            log.warning("Signals are not caught: training does not run in the main thread")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop on all ranks if one of them received a signal."""
        ask = self.received if trainer.world_size == 1 else batch_idx % self.ask_every == 0
        self._stopping |= bool(ask) and self._received_anywhere(trainer)
        if self._stopping and has_stepped(trainer, batch_idx):  # accumulated gradients are not saved
            trainer.save_checkpoint(self.path)
            # A run resumed after the last batch of an epoch would skip the validation. The checkpoint is written
            # nevertheless, since some systems kill a process soon after the signal.
            if not trainer.is_last_batch:
                # Lightning logs a step after the callbacks, and the resumed run begins with the next step.
                trainer._logger_connector.update_train_step_metrics()
                self._stop(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop after a signal in the last batch or in the validation of an epoch."""
        if self._stopping or self._received_anywhere(trainer):
            trainer.save_checkpoint(self.path)
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a signal at the very end. The checkpoint of the last epoch is written already."""
        if self._received_anywhere(trainer):
            self._stop(trainer)

    def _received_anywhere(self, trainer: Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)

    def _stop(self, trainer: Trainer) -> None:
        number = self.received or int(signal.SIGTERM)
        run, step = self.path.parent.parent, trainer.global_step
        if trainer.is_global_zero:
            log.warning("Stopped by %s after step %d. Continue with resume=%s", signal.Signals(number).name, step, run)
        raise Stopped(self._exit_code(trainer, number), number)

    def _exit_code(self, trainer: Trainer, number: int) -> int:
        # Lightning's launcher and `srun --kill-on-bad-exit` kill rank 0 if another process fails.
        quiet = trainer.global_rank > 0 and "TORCHELASTIC_RUN_ID" not in os.environ
        return 0 if quiet else 128 + number

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # torchrun passes on the Ctrl-C that the terminal has sent to all processes, so that each of them gets two.
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if os.environ.get("LOCAL_RANK", "0") == "0":  # and not by print, which is not safe in a signal handler
                os.write(2, b"\nSaving at the end of this step. Press Ctrl-C again to end at once, without saving.\n")
