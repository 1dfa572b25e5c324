"""Loggers: a csv file that survives a resume, and Weights & Biases that never stops a run."""

import csv
import logging
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack
from urllib.parse import urlparse

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from fewtokens.analysis.predictions import ImageTable
from fewtokens.errors import FewtokensError, check, check_choice, first_line, write_error
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


class WandbSettings(TypedDict, total=False):
    """Arguments of `wandb.init` that are passed on unchanged; None is the same as not given."""

    project: str | None
    entity: str | None
    name: str | None
    group: str | None
    job_type: str | None
    notes: str | None


class WandbRun(WandbLogger):
    """Weights & Biases, online with an account and a network, otherwise offline. A resumed run keeps its run id.

    Args:
        directory: Folder of the run, for `wandb/` and the run id.
        tags: Tags of the run; `describe` adds to them.
        mode: "online", "offline", or "auto", which is online if there is an account and the server responds.
        log_model: Whether the best checkpoint is uploaded as an artifact at the end; "all": every one when it is saved.
        watch: What of the model W&B draws: "gradients", "parameters", "all" or None.
        finish_timeout: Seconds to wait at the end for what has not been uploaded; `wandb sync` uploads it later. W&B's
            own default is to wait for ever.
        settings: See `WandbSettings`.

    Raises:
        FewtokensError: A setting has none of its choices.
    """

    def __init__(
        self,
        directory: str,
        tags: list[str] | None = None,
        mode: str = "auto",
        log_model: bool | str = False,
        watch: str | None = None,
        finish_timeout: float = 120.0,
        **settings: Unpack[WandbSettings],
    ) -> None:
        check_choice("logger.wandb.mode", mode, ("auto", "online", "offline"))
        check_choice("logger.wandb.log_model", log_model, (True, False, "all"))
        check_choice("logger.wandb.watch", watch, ("gradients", "parameters", "all", None))
        check(finish_timeout > 0, "logger.wandb.finish_timeout", "a number > 0", finish_timeout)
        reason = why_offline() if mode == "auto" else None
        if reason:
            log.info("Weights & Biases runs offline: %s", reason)
        given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
        super().__init__(
            tags=list(tags or []),
            save_dir=directory,
            id=_run_id(Path(directory) / "wandb_run_id"),
            resume="allow",
            offline=mode == "offline" or reason is not None,
            settings={"finish_timeout": finish_timeout},
            **({"project": "fewtokens"} | given),
        )
        # Lightning refuses it offline, but `wandb sync` uploads artifacts, too.
        self._log_model, self._watch = log_model, watch  # type: ignore[assignment]

    def describe(self, tags: Sequence[str], model: nn.Module) -> None:
        """Add tags, and watch the model if the settings ask for it. This must be called before anything is logged."""
        self._wandb_init["tags"] = list(dict.fromkeys([*self._wandb_init["tags"], *tags]))
        if self._watch is not None:
            self.watch(model, log=self._watch)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the checkpoints, if the settings ask for it. An error ends no run that has succeeded."""
        try:
            super().finalize(status)
        except Exception as error:
            _warn("a checkpoint", error)

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
            wandb.teardown()  # or the id of the run counts as in use
            return super().experiment
        finally:
            sys.argv = arguments


def mlflow(directory: str, experiment_name: str, run_name: str | None = None) -> MLFlowLogger:
    """Return Lightning's logger for MLflow, with a database in the folder of the run.

    Args:
        directory: Folder of the run, for `mlflow.db`, unless the variable MLFLOW_TRACKING_URI names a server.
        experiment_name: Name of the experiment.
        run_name: Name of the run.

    Raises:
        FewtokensError: MLflow is not installed.
    """
    path = Path(directory) / "mlflow.db"
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{path.absolute()}")
    try:
        return MLFlowLogger(experiment_name, run_name, tracking_uri=uri)
    except ModuleNotFoundError as error:
        raise FewtokensError("logger=mlflow needs MLflow, which is not installed: pip install mlflow") from error


def log_table(logger: Logger, name: str, table: ImageTable) -> None:
    """Log a table of images to Weights & Biases. Other loggers show none."""
    if isinstance(logger, WandbLogger):
        import wandb

        rows = [[wandb.Image(picture), *row] for picture, row in zip(table.pictures, table.rows, strict=True)]
        try:
            logger.log_table(name, columns=["image", *table.columns], data=rows)
        except Exception as error:  # a table is an artifact, about which the server is asked at once
            _warn("the table", error)


def _warn(what: str, error: Exception) -> None:
    reason = first_line(error)
    log.warning("Weights & Biases did not take %s, which is in the directory of the run: %s", what, reason)


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
    """Return the run id in the folder of the run, which a resumed run continues. Create it if there is none.

    In a W&B sweep, the agent has created the run and says its id.
    """
    if not path.exists() and getattr(rank_zero_only, "rank", 0) in (None, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    return path.read_text().strip() if path.exists() else secrets.token_hex(4)
