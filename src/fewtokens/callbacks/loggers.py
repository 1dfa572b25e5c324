"""Loggers: a csv file that survives a resume, and Weights & Biases that never stops a run."""

import csv
import logging
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from fewtokens.errors import check_choice, first_line, write_error
from fewtokens.files import replace_file
from fewtokens.masking import mask
from fewtokens.network import responds

log = logging.getLogger(__name__)


class CsvLogger(Logger):
    """Appends to `metrics.csv`: one row per call and one column per metric, with `step` first.

    Lightning's CSVLogger is not used because it deletes the existing file when a run resumes.

    Args:
        directory: Folder of the run.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.columns = self._read()[0]
        self._rewind_to: int | None = None

    @property
    def name(self) -> str:
        """Return the name of the logger, which Lightning requires."""
        return "csv"

    @property
    def version(self) -> str:
        """Return no version: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the folder of the run contains the config already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row. New metrics add columns."""
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self.columns]
        if new or self._rewind_to is not None:
            self.columns += new
            self._rewrite(self._read()[1], self._rewind_to)
            self._rewind_to = None
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)
        except OSError as error:
            raise write_error(self.path, error) from error

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Delete the rows from `step` on, because a run that resumes there logs them again.

        They are deleted when the next row is logged, so that a resume that fails before changes nothing.
        """
        self._rewind_to = step

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]  # skips a row that a kill cut short
            return list(reader.fieldnames or []), rows

    def _rewrite(self, rows: list[dict[str, str]], before: int | None) -> None:
        kept = [row for row in rows if before is None or (row["step"] and int(row["step"]) < before)]
        with replace_file(self.path, newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(kept)


class WandbRun(WandbLogger):
    """Weights & Biases, online with an account and a network, otherwise offline. A resumed run keeps its run id.

    Args:
        directory: Folder of the run, for `wandb/` and the run id.
        project: Project at Weights & Biases.
        name: Name of the run.
        group: Group of the run.
        tags: Tags of the run.
        mode: "online", "offline", or "auto", which is online if there is an account and the server responds.

    Raises:
        FewtokensError: The mode is unknown.
    """

    def __init__(
        self,
        directory: str,
        project: str = "fewtokens",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
    ) -> None:
        check_choice("logger.wandb.mode", mode, ("auto", "online", "offline"))
        reason = why_offline() if mode == "auto" else None
        if reason:
            log.info("Weights & Biases runs offline: %s", reason)
        super().__init__(
            project=project,
            name=name,
            group=group,
            tags=list(tags or []),
            save_dir=directory,
            id=_run_id(Path(directory) / "wandb_run_id"),
            resume="allow",
            offline=mode == "offline" or reason is not None,
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run. If the server rejects it, return an offline run."""
        import wandb

        arguments, sys.argv = sys.argv, [*map(mask, sys.argv)]  # W&B records them
        try:
            return super().experiment
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            log.warning("Weights & Biases goes offline: %s", first_line(error))
            self._offline = True
            self._wandb_init["mode"] = "offline"
            return super().experiment
        finally:
            sys.argv = arguments


def why_offline() -> str | None:
    """Return the reason why no connection should be tried, or None."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlparse(url).hostname or ""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return "no account (WANDB_API_KEY or wandb login)"
    return None if responds(url, 3.0) else f"{host} does not respond"


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return path.is_file() and host in path.read_text()


def _run_id(path: Path) -> str:
    """Return the run id in the folder of the run, which a resumed run continues. Create it if there is none."""
    if not path.exists() and getattr(rank_zero_only, "rank", 0) in (None, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip() if path.exists() else secrets.token_hex(4)
