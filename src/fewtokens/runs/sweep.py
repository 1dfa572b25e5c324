"""Sweeps (`-m`) that end with a table of their jobs, and that continue where they were interrupted."""

import csv
import math
import shlex
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from fewtokens.errors import FewtokensError, first_line
from fewtokens.files import read_record, replace_file
from fewtokens.masking import masked
from fewtokens.runs.distributed import is_rank_zero

TABLE = "sweep.csv"
SHOWN = ("test/top1", "test/map", "val/loss", "cost/gmacs", "train/seconds")  # on the screen; the file has all numbers


@dataclass
class SweepJob:
    """A job of a sweep, which is a row of `sweep.csv`.

    Args:
        overrides: Overrides of the job, except those that say where the sweep is.
        path: Its run directory, relative to that of the sweep.
        state: "missing", "finished", "failed" or "stopped".
        reason: Why it failed or stopped.
        numbers: Its report, if it has finished.
        extra: Further overrides, which are not in the table.
    """

    overrides: list[str]
    path: str = ""
    state: str = "missing"
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)

    def read(self, sweep: Path) -> None:
        """Read from the run directory how the job ended, if this is written there.

        Args:
            sweep: Directory of the sweep.
        """
        run = sweep / self.path
        record, report = read_record(run / "run.json"), read_record(run / "report.json")
        status = record.get("status", self.state)
        # An evaluation that was killed after it wrote its report. A training would be resumed.
        complete = bool(report) and not (run / "checkpoints" / "last.ckpt").exists()
        if status == "started" and not complete:
            self.state, self.reason = "stopped", "its process was killed"
        elif status in ("started", "finished"):
            self.state, self.reason, self.numbers = "finished", "", report or self.numbers
        else:
            self.state, self.reason = str(status), str(record.get("reason", self.reason))


class TableSweeper(Sweeper):
    """A sweep over all combinations, as Hydra's own, with a table of the jobs, which also tells what is left to do.

    The table is `sweep.csv` in the directory of the sweep. It is written before the first job and after every job, with
    other launchers than Hydra's own after every batch, and printed at the end. How a job ended is read from its run
    directory, and so is known after a kill, too. With `sweep=<directory>`, jobs that have finished do not run again, a
    training that was interrupted is resumed, and the others start from scratch.

    Args:
        max_batch_size: Largest number of jobs that a launcher gets at once; null: all.
        params: Overrides in addition to those of the command line.
    """

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Build the launcher."""
        self.hydra_context, self.cfg = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        """Run all jobs.

        Args:
            arguments: Overrides of the command line.

        Raises:
            FewtokensError: Some of the jobs have not finished.
        """
        directory, jobs = Path(self.cfg.hydra.sweep.dir), list[SweepJob]()
        try:
            self.run(arguments, directory, jobs)
        finally:
            if jobs and is_rank_zero():
                self.summarize(jobs, directory)
        if left := len(self.left(jobs)):
            raise FewtokensError(
                f"{left} of {len(jobs)} jobs have not finished. Run them again: the same command with sweep={directory}"
            )

    def run(self, arguments: list[str], directory: Path, jobs: list[SweepJob]) -> None:
        """Run all jobs that have not finished.

        Args:
            arguments: Overrides of the command line.
            directory: Directory of the sweep.
            jobs: Every job is appended.
        """
        found, others = self._jobs(arguments, directory)
        jobs += found
        self.launch(jobs, others, directory)

    def summarize(self, jobs: list[SweepJob], directory: Path) -> None:
        """Print the table of all jobs."""
        print_table(jobs, directory, OmegaConf.select(self.cfg, "optimized_metric"))

    def left(self, jobs: list[SweepJob]) -> list[SweepJob]:
        """Return the jobs that the same command would run again."""
        return [job for job in jobs if job.state != "finished"]

    def _jobs(self, arguments: list[str], directory: Path) -> tuple[list[SweepJob], list[SweepJob]]:
        """Return the jobs of the command, and those of other commands that the directory of the sweep contains."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        combinations = BasicSweeper.split_arguments([part for part in parsed if part.key_or_group != "sweep"], None)[0]
        known = read_table(directory) if OmegaConf.select(self.cfg, "sweep") is not None else []
        jobs, count = [], len(known)
        for overrides in combinations:
            same = [row for row in known if sorted(row.overrides) == sorted(masked(overrides))]
            job = SweepJob(overrides)
            if same:
                known.remove(same[0])
                job.path, job.state, job.reason = same[0].path, same[0].state, same[0].reason
                job.numbers = same[0].numbers
                job.read(directory)
            if job.state != "finished":  # all are composed before the first one runs, so that a wrong name ends here
                path = self._compose(job, directory, count)
                job.path, count = job.path or path, count + (not same)
            jobs.append(job)
        return jobs, known

    def _compose(self, job: SweepJob, directory: Path, number: int) -> str:
        """Compose the config of a job as the launcher does, and return its run directory."""
        cfg = self.hydra_context.config_loader.load_sweep_config(self.cfg, [*job.overrides])
        with open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = number, str(number)
        run = Path(cfg.hydra.sweep.dir) / str(cfg.hydra.sweep.subdir)
        return str(run.relative_to(directory) if run.is_relative_to(directory) else run.absolute())

    def launch(self, jobs: list[SweepJob], others: list[SweepJob], directory: Path) -> None:
        """Launch the jobs that have not finished, and write the table of all before and after every batch."""
        if is_rank_zero():
            directory.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(masked(OmegaConf.to_container(self.cfg))), directory / "multirun.yaml")
        one_by_one = type(self.launcher).__name__ == "BasicLauncher"
        todo = [job for job in jobs if job.state != "finished"]
        write_table([*others, *jobs], directory)
        size = 1 if one_by_one else self.max_batch_size or max(1, len(todo))
        for batch in (todo[start : start + size] for start in range(0, len(todo), size)):
            overrides = [_arguments(job, directory) for job in batch]
            for job in batch:
                job.state, job.reason = "missing", ""
            try:
                results = self.launcher.launch(overrides, initial_job_idx=len(others) + jobs.index(batch[0]))
            finally:
                for job in batch:
                    job.read(directory)
                write_table([*others, *jobs], directory)
            for job, result in zip(batch, results, strict=True):
                if result.status == JobStatus.FAILED and job.state != "stopped":  # a trial that was pruned
                    job.state, job.reason = "failed", str(result._return_value)
                elif job.state == "missing":  # a command that writes no run.json
                    job.state = "finished"
            write_table([*others, *jobs], directory)


def read_table(directory: Path) -> list[SweepJob]:
    """Return the jobs in `sweep.csv`.

    Raises:
        FewtokensError: The directory has none, or it is damaged.
    """
    path = directory / TABLE
    if not path.is_file():
        raise FewtokensError(f"`sweep` must be the directory of a sweep, which contains {TABLE}, got {directory}.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_job(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise FewtokensError(
            f"Cannot read {path}: {first_line(error)}. Correct it, or start another sweep without sweep=<directory>."
        ) from error


def _job(row: dict[str, str]) -> SweepJob:
    texts = [row.pop(name, None) for name in ("overrides", "path", "state", "reason")]
    overrides, path, state, reason = (text for text in texts if text is not None)
    numbers = {name: float(value) for name, value in row.items() if value}
    return SweepJob(shlex.split(overrides), path, state, reason, numbers)


def write_table(jobs: Sequence[SweepJob], directory: Path) -> None:
    """Write `sweep.csv`, in the process with rank 0: a row for every job, with all numbers of its report."""
    if not is_rank_zero():
        return
    names = sorted({name for job in jobs for name in job.numbers})
    with replace_file(directory / TABLE, newline="") as file:
        writer = csv.DictWriter(file, ["overrides", "state", "reason", *names, "path"])
        writer.writeheader()
        for job in jobs:
            texts = {
                "overrides": shlex.join(masked(job.overrides)),
                "state": job.state,
                "reason": masked([job.reason])[0],
            }
            writer.writerow({**texts, **job.numbers, "path": job.path})


def print_table(jobs: Sequence[SweepJob], directory: Path, metric: str | None = None) -> None:
    """Print the jobs with the overrides that differ, and the mean of those that differ only in their seed.

    Args:
        jobs: The jobs.
        directory: Directory of the sweep.
        metric: A number of the reports to show first, in addition to the usual ones.
    """
    found = {name for job in jobs for name in job.numbers}
    names = [name for name in dict.fromkeys([*([metric] if metric else []), *SHOWN]) if name in found]
    console = Console()
    table = Table("", "overrides", "state", *names, title=str(directory), title_justify="left")
    for job, shown in zip(jobs, _differing([masked(job.overrides) for job in jobs]), strict=True):
        state = f"{job.state}: {masked([job.reason])[0]}" if job.reason else job.state
        table.add_row(job.path, shown, state, *(_text(job.numbers.get(name)) for name in names))
    console.print(table)
    groups = by_seed(jobs)
    if any(len(group) > 1 for group in groups.values()):
        table = Table("over seeds: mean and 95 % interval", "n", *names)
        for shown, group in zip(_differing([list(key) for key in groups]), groups.values(), strict=True):
            values = [[job.numbers[name] for job in group if name in job.numbers] for name in names]
            table.add_row(shown, str(len(group)), *(mean_and_interval(column) for column in values))
        console.print(table)
    console.print(f"Table: {directory / TABLE}", soft_wrap=True)


def by_seed(jobs: Sequence[SweepJob]) -> dict[tuple[str, ...], list[SweepJob]]:
    """Return the finished jobs by their overrides, those of the seed excluded."""
    groups: dict[tuple[str, ...], list[SweepJob]] = defaultdict(list)
    for job in jobs:
        if job.state == "finished":
            groups[tuple(part for part in masked(job.overrides) if part.partition("=")[0] != "seed")].append(job)
    return groups


def mean_and_interval(values: Sequence[float]) -> str:
    """Return the mean of some runs and half the width of its 95 % interval, by Student's t: "0.9812 ± 0.0031"."""
    if len(values) < 2:
        return _text(values[0]) if values else ""
    from scipy.stats import t  # takes a second to import

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return (
        f"{_text(statistics.mean(values))} ± {half:.2g}"
        if half < 99.5
        else f"{statistics.mean(values):.0f} ± {half:.0f}"
    )


def _arguments(job: SweepJob, directory: Path) -> list[str]:
    """Return the overrides with which a job is launched: also its directory, and the run that it resumes."""
    run = directory / job.path
    begun = job.state != "missing" and (run / "checkpoints" / "last.ckpt").is_file()
    given = any(part.lstrip("+").startswith("resume=") for part in job.overrides)
    resume = [f"resume={quoted(str(run))}"] if begun and not given else []
    where = [f"hydra.sweep.dir={quoted(str(directory))}", f"hydra.sweep.subdir={quoted(job.path)}"]
    return [*job.overrides, *job.extra, *where, *resume]


def quoted(text: str) -> str:
    """Return a text as a value of an override, whatever characters it has."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _differing(rows: list[list[str]]) -> list[str]:
    """Return the overrides of every row that not all rows have."""
    return [" ".join(part for part in row if not all(part in other for other in rows)) for row in rows]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
