"""The early end of a trial of a search that does worse than others."""

import os

from lightning.pytorch import Callback, LightningModule, Trainer

from fewtokens.errors import FewtokensError, listed

STUDY = "search"  # name of the study in its storage
TRIAL = "FEWTOKENS_TRIAL"  # an environment variable of the job, since it belongs to no config that is saved


class PrunedError(FewtokensError):
    """A trial was ended because others did better at the same epoch."""


class Pruning(Callback):
    """Reports a metric to Optuna after every validation, and ends the run if the study's pruner says so.

    Args:
        monitor: The metric.
        trial: Optuna's id of the trial, which is not its number.
        startup_trials: Number of trials that are not pruned.
        storage: Storage of the study, such as sqlite:///study.db
    """

    def __init__(self, monitor: str, trial: int, startup_trials: int, storage: str) -> None:
        self.monitor, self.trial, self.startup_trials, self.storage = monitor, trial, startup_trials, storage

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report and ask.

        Raises:
            PrunedError: The trial ends here.
            FewtokensError: Validation has no such metric.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        worse = trainer.is_global_zero and self._is_worse(trainer)
        if trainer.strategy.broadcast(worse):
            raise PrunedError(
                f"Pruned after epoch {trainer.current_epoch + 1}: other trials had a better {self.monitor}."
            )

    def _is_worse(self, trainer: Trainer) -> bool:
        import optuna

        if self.monitor not in trainer.callback_metrics:
            known = [name for name in trainer.callback_metrics if name.startswith("val/")]
            raise FewtokensError(
                f"`optimized_metric` must be a metric of the validation for pruning, got {self.monitor}. Use one of "
                f"{listed(known)}, or set hydra.sweeper.pruning=false."
            )
        pruner = optuna.pruners.MedianPruner(self.startup_trials)  # which no storage keeps
        study = optuna.load_study(study_name=STUDY, storage=self.storage, pruner=pruner)
        trial = optuna.trial.Trial(study, self.trial)
        trial.report(float(trainer.callback_metrics[self.monitor]), trainer.current_epoch)
        return bool(trial.should_prune())


def trial_of_environment() -> list[Callback]:
    """Return the callback of the trial that this job is, if it is one."""
    if TRIAL not in os.environ:
        return []
    monitor, trial, startup_trials, storage = os.environ[TRIAL].split(" ", 3)
    return [Pruning(monitor, int(trial), int(startup_trials), storage)]
