"""The runs of the suite: a method with a setting, off the shelf or after a short training, and its row."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewtokens.benchmarks.variants import overrides_of, short_name
from fewtokens.errors import FewtokensError
from fewtokens.runs.pages.record import read_run

OFF_THE_SHELF, FINE_TUNED = "off_the_shelf", "fine_tuned"


@dataclass(frozen=True)
class Trial:
    """A run of the suite.

    Args:
        part: "off_the_shelf": evaluated as it is; "fine_tuned": after a short training.
        method: An option of configs/tokenizer, followed by all of its settings that are not the default.
        wanted: The share of the dense model's multiply-adds for which the setting was chosen; None if it was given.
        seed: Seed of the training; 0 without one.
    """

    part: str
    method: str
    wanted: float | None = None
    seed: int = 0

    @property
    def option(self) -> str:
        """Return the option of configs/tokenizer."""
        return self.method.split()[0]

    @property
    def setting(self) -> str:
        """Return the settings, as in "at=6 num_tokens=8"."""
        return short_name(self.method).partition(" ")[2].strip()

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what tells this run from others."""
        return self.part, self.method, self.seed

    @property
    def directory(self) -> Path:
        """Return the directory of the run, relative to that of all runs."""
        name = re.sub(r"[^A-Za-z0-9.]+", "_", self.method).strip("_")
        return Path(self.part, name, str(self.seed)) if self.part == FINE_TUNED else Path(self.part, name)

    def arguments(self, checkpoint: str, overrides: Sequence[str], train: Sequence[str]) -> list[str]:
        """Return the command of the run, without its directory.

        Args:
            checkpoint: The dense model.
            overrides: Overrides of every run.
            train: Overrides of a training, which come first.
        """
        tokenizer = overrides_of(self.method)
        if self.part == OFF_THE_SHELF:
            return ["eval.py", f"checkpoint={checkpoint}", *tokenizer, *overrides]
        return ["train.py", *train, f"init_from={checkpoint}", *tokenizer, f"seed={self.seed}", *overrides]


def row_of(trial: Trial, directory: Path, command: str, metric: str) -> dict[str, Any]:
    """Return the row of a finished run.

    Args:
        trial: The run.
        directory: Its directory.
        command: The command as it is shown, without paths of this machine.
        metric: Name of the accuracy in report.json.

    Raises:
        FewtokensError: Its report lacks a number.
    """
    run = read_run(directory)
    needed = (metric, "cost/gmacs", "cost/gmacs_std", "cost/gmacs_dense", "cost/params")
    if missing := [name for name in needed if name not in run.numbers]:
        raise FewtokensError(
            f"{directory / 'report.json'} has no {', '.join(missing)}. Remove the directory, and keep measure=cost in "
            "`evaluate`."
        )
    numbers = run.numbers
    return {
        **asdict(trial),
        "accuracy": numbers[metric],
        "gmacs": numbers["cost/gmacs"],
        "gmacs_std": numbers["cost/gmacs_std"],
        "share": numbers["cost/gmacs"] / numbers["cost/gmacs_dense"],
        "params": int(numbers["cost/params"]),
        "seconds": numbers.get("train/seconds"),
        "command": command,
        "commit": run.about.get("commit"),
        "date": run.about.get("written"),
        "measured_on": run.about.get("measured_on"),
        "versions": run.versions,
    }


def trial_of(row: dict[str, Any]) -> Trial:
    """Return the run of a row."""
    return Trial(row["part"], row["method"], row["wanted"], row["seed"])
