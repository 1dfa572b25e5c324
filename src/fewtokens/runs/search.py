"""A search of settings with Optuna, as a sweep of Hydra (`-m`) that can be continued."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from fewtokens.errors import FewtokensError, check, check_choice, first_line
from fewtokens.runs.sweep import SweepJob, TableSweeper, quoted, read_table

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

NAME, TRIAL = "search", "FEWTOKENS_TRIAL"  # as in callbacks.pruning, which imports torch


class OptunaSweeper(TableSweeper):
    """Runs trials with settings that Optuna suggests, and ends those early that do worse than others.

    The study is `study.db` in the directory of the sweep. With `sweep=<directory>` the trials that a kill has
    interrupted are resumed, and new ones are run until there are `n_trials`.

    Args:
        direction: "minimize" or "maximize" `optimized_metric`, which must be a metric of the validation for pruning.
        n_trials: Number of trials, those that failed included.
        n_jobs: Trials that a launcher gets at once.
        pruning: End trials whose metric is worse than the median of the others at the same epoch.
        startup_trials: Trials with random settings, which are not pruned.
        seed: Seed of the suggestions.
        params: The settings to search, in addition to the sweeps of the command line.
    """

    def __init__(
        self,
        direction: str = "minimize",
        n_trials: int = 20,
        n_jobs: int = 1,
        pruning: bool = True,
        startup_trials: int = 5,
        seed: int = 0,
        params: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, params)
        self.direction, self.n_trials, self.n_jobs = direction, n_trials, n_jobs
        self.pruning, self.startup_trials, self.seed = pruning, startup_trials, seed

    def run(self, arguments: list[str], directory: Path, jobs: list[SweepJob]) -> None:
        """Run trials until there are enough.

        Args:
            arguments: Overrides of the command line.
            directory: Directory of the sweep.
            jobs: Every trial is appended.

        Raises:
            FewtokensError: A setting is wrong, or Optuna is not installed.
        """
        metric, space, fixed = self._settings(arguments)
        jobs += read_table(directory) if OmegaConf.select(self.cfg, "sweep") is not None else []
        directory.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(directory / 'study.db').absolute()}"
        check(
            "?" not in storage, "hydra.sweep.dir", "a path without ?, which ends the path of a database", str(directory)
        )
        study, batch = self._study(storage, directory)
        _check_space(study, space)
        while batch or len(study.trials) < self.n_trials:
            batch = batch or [study.ask(space) for _ in range(min(self.n_jobs, self.n_trials - len(study.trials)))]
            launched = [self._job(trial, fixed, jobs) for trial in batch]
            for trial, job in zip(batch, launched, strict=True):
                given = f"{metric} {trial._trial_id} {self.startup_trials} {storage}"
                job.extra = [f"++hydra.job.env_set.{TRIAL}={quoted(given)}"] if self.pruning else []
                job.read(directory)
            self.launch(launched, [job for job in jobs if job not in launched], directory)
            for trial, job in zip(batch, launched, strict=True):
                _tell(study, trial, job, metric)
            batch = []

    def summarize(self, jobs: list[SweepJob], directory: Path) -> None:
        """Print the table of all trials, and the settings of the best one."""
        super().summarize(jobs, directory)
        metric, sign = str(self.cfg.optimized_metric), 1 if self.direction == "minimize" else -1
        values = [(sign * value, job) for job in jobs if (value := _value(job, metric)) is not None]
        if values:
            best = min(values, key=lambda pair: pair[0])[1]
            settings = " ".join(part for part in best.overrides if not part.startswith(("hparams_search=", "hydra")))
            print(f"Best {metric}: {best.numbers[metric]:.6g} in {directory / best.path}\n  {settings}")

    def left(self, jobs: list[SweepJob]) -> list[SweepJob]:
        """Return the jobs that have failed. Those that were pruned have not."""
        return [job for job in jobs if job.state == "failed"]

    def _settings(self, arguments: list[str]) -> "tuple[str, dict[str, BaseDistribution], list[str]]":
        """Return the metric, the distributions of the settings to search, and the overrides of all trials."""
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise FewtokensError("hydra/sweeper=optuna needs Optuna. Install it: pip install -e '.[search]'") from error
        check_choice("hydra.sweeper.direction", self.direction, ("minimize", "maximize"))
        check(self.n_trials >= 1, "hydra.sweeper.n_trials", "an int >= 1", self.n_trials)
        check(self.n_jobs >= 1, "hydra.sweeper.n_jobs", "an int >= 1", self.n_jobs)
        metric = OmegaConf.select(self.cfg, "optimized_metric")
        check(isinstance(metric, str), "optimized_metric", "a number of report.json, such as val/loss", metric)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        try:
            space = {part.get_key_element(): distribution(part) for part in parsed if part.is_sweep_override()}
        except ValueError as error:
            raise FewtokensError(f"A setting to search has wrong bounds: {first_line(error)}. Correct them.") from error
        check(bool(space), "hydra.sweeper.params", "settings to search: {optimizer.lr: interval(1e-4,1e-2)}", {})
        fixed = [part for part in parsed if not part.is_sweep_override() and part.key_or_group != "sweep"]
        return str(metric), space, [str(part.input_line) for part in fixed]

    def _study(self, storage: str, directory: Path) -> "tuple[Study, list[Trial]]":
        """Return the study, and the trials in it that were interrupted.

        Raises:
            FewtokensError: The study is damaged, or has the other direction.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(
                storage=storage,
                study_name=NAME,
                direction=self.direction,  # type: ignore[arg-type]  # checked before
                pruner=optuna.pruners.MedianPruner(self.startup_trials),
                load_if_exists=True,
            )
        except Exception as error:  # of SQLAlchemy, which has a class for each kind
            raise FewtokensError(
                f"Cannot use {directory / 'study.db'}: {first_line(error)}. Choose another hydra.sweep.dir."
            ) from error
        before = study.direction.name.lower()
        check(
            self.direction == before, "hydra.sweeper.direction", f"{before}, as when the search began", self.direction
        )
        # Another seed after an interruption, or the first suggestions would come again.
        seed = self.seed + len(study.trials)
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=self.startup_trials, seed=seed)
        begun = [trial for trial in study.trials if not trial.state.is_finished() and "path" in trial.user_attrs]
        return study, [optuna.trial.Trial(study, trial._trial_id) for trial in begun]

    def _job(self, trial: "Trial", fixed: list[str], jobs: list[SweepJob]) -> SweepJob:
        """Return the job of a trial, and append it to the others if it is new."""
        path = str(trial.number)
        trial.set_user_attr("path", path)
        found = [job for job in jobs if job.path == path]
        if not found:
            found = [SweepJob([*fixed, *(f"{key}={value}" for key, value in trial.params.items())], path)]
            jobs += found
        return found[0]


def install_sweepers() -> None:
    """Let Hydra use `TableSweeper` in place of its own sweeper, and this one as `hydra/sweeper=optuna`.

    Hydra accepts no plugin from outside of its own packages, except by this table.
    """
    known = Plugins.instance().class_name_to_class
    known[f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"] = TableSweeper
    known["hydra_plugins.fewtokens.OptunaSweeper"] = OptunaSweeper


def _check_space(study: "Study", space: "Mapping[str, BaseDistribution]") -> None:
    """Raise an error if a setting has other choices, or is of another kind, than in earlier trials.

    Raises:
        FewtokensError: One has. Other bounds are allowed.
    """
    from optuna.distributions import check_distribution_compatibility

    for trial in study.trials:
        for name in trial.distributions.keys() & space.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], space[name])
            except ValueError as error:
                raise FewtokensError(
                    f"The search began with {name} in {trial.distributions[name]}, got {space[name]}: only bounds may "
                    "change. Use the same choices, or start another search without sweep=<directory>."
                ) from error


def distribution(override: Override) -> "BaseDistribution":
    """Return Optuna's distribution of an override: `interval`, `range` or a choice, `tag(log,...)` for logarithmic."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        bounds: list[Any] = [value.start, value.end]
        kind = IntDistribution if all(isinstance(bound, int) for bound in bounds) else FloatDistribution
        return kind(*bounds, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        if not numbers:
            raise ValueError(f"{override.input_line} has no value")
        kind = IntDistribution if all(isinstance(number, int) for number in numbers) else FloatDistribution
        return kind(min(numbers), max(numbers), step=abs(value.step))  # type: ignore[arg-type]  # of the same type
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _tell(study: "Study", trial: "Trial", job: SweepJob, metric: str) -> None:
    """Tell Optuna how a trial ended. One that was interrupted is still running, as far as it knows."""
    from optuna.trial import TrialState

    value = _value(job, metric)
    if value is not None:
        study.tell(trial, value)
    elif job.state == "stopped" and job.reason.startswith("Pruned"):
        study.tell(trial, state=TrialState.PRUNED)
    elif job.state in ("finished", "failed"):
        study.tell(trial, state=TrialState.FAIL)


def _value(job: SweepJob, metric: str) -> float | None:
    """Return the metric of a trial, or None if it has not finished or has no finite one."""
    value = job.numbers.get(metric, math.nan)
    return value if job.state == "finished" and math.isfinite(value) else None
