import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewtokens.analysis.predictions import ImageTable
from fewtokens.callbacks import loggers
from fewtokens.callbacks.loggers import CsvLogger, WandbRun, why_offline
from fewtokens.errors import FewtokensError


def rows(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_and_columns_grow(tmp_path: Path) -> None:
    logger = CsvLogger(str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_metrics({"b": 2.0}, step=1)
    logger.log_metrics({"a": 3.0, "b": 4.0}, step=2)
    assert rows(tmp_path) == [
        {"step": "0", "a": "1.0", "b": ""},
        {"step": "1", "a": "", "b": "2.0"},
        {"step": "2", "a": "3.0", "b": "4.0"},
    ]


def test_a_resumed_run_forgets_what_it_will_log_again(tmp_path: Path) -> None:
    first = CsvLogger(str(tmp_path))
    for step in range(5):
        first.log_metrics({"a": float(step)}, step=step)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("5")  # cut short by a kill
    again = CsvLogger(str(tmp_path))
    again.rewind(3)
    again.log_metrics({"a": 9.0, "c": 1.0}, step=3)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [
        ("0", "0.0"),
        ("1", "1.0"),
        ("2", "2.0"),
        ("3", "9.0"),
    ]


def test_a_full_disk_is_an_error_with_a_sentence(tmp_path: Path) -> None:
    logger = CsvLogger(str(tmp_path))
    (tmp_path / ".metrics.csv.part").symlink_to("/dev/full")
    with pytest.raises(FewtokensError, match=r"Cannot write .*metrics\.csv: No space left on device"):
        logger.log_metrics({"a": 1.0}, step=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    with pytest.raises(FewtokensError, match=r"Cannot write .*metrics\.csv: No space left on device"):
        logger.log_metrics({"a": 1.0}, step=0)


def test_wandb_stays_offline_without_an_account_or_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert "no account" in str(why_offline())
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert "does not respond" in str(why_offline())
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE" in str(why_offline())


def test_wandb_keeps_its_run_id_in_the_run_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, again = WandbRun(str(tmp_path)), WandbRun(str(tmp_path))
    other = WandbRun(str(tmp_path / "other"))
    assert first.version == again.version == (tmp_path / "wandb_run_id").read_text()
    assert other.version != first.version
    with pytest.raises(FewtokensError, match=r"`logger\.wandb\.mode` must be"):
        WandbRun(str(tmp_path), mode="on")  # type: ignore[arg-type]


class Run:
    """Stands for W&B's run."""

    step = 0

    def __getattr__(self, name: str) -> object:
        return lambda *args, **kwargs: None


def test_settings_reach_wandb_unchanged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    given: dict[str, object] = {}
    monkeypatch.setattr(wandb, "init", lambda **settings: given.update(settings) or Run())
    monkeypatch.setenv("WANDB_RUN_ID", "ofagent1")
    settings = {"entity": "team", "group": "g", "job_type": "sweep", "notes": "why", "project": "p", "name": "n"}
    logger = WandbRun(str(tmp_path), mode="offline", tags=["a"], log_model="all", watch=None, **settings)
    logger.describe(["b", "a"], torch.nn.Linear(1, 1))
    _ = logger.experiment
    assert settings.items() <= given.items()
    assert (given["tags"], given["id"], given["resume"]) == (["a", "b"], "ofagent1", "allow")
    _ = WandbRun(str(tmp_path), mode="offline", entity=None).experiment
    assert given["project"] == "fewtokens"
    with pytest.raises(FewtokensError, match=r"`logger\.wandb\.watch` must be 'gradients' or 'parameters' or 'all'"):
        WandbRun(str(tmp_path), watch="gradient")


def test_offline_wandb_keeps_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbRun(str(tmp_path), mode="offline")
    table = ImageTable(np.zeros((1, 2, 2, 3), dtype=np.uint8), ("label", "tokens"), [["cat", 5]])
    loggers.log_table(logger, "test/predictions", table)
    loggers.log_table(CsvLogger(str(tmp_path)), "test/predictions", table)
    wandb.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/files/media/table/test/predictions_*.table.json")
    content = json.loads(file.read_text())
    assert content["columns"] == ["image", "label", "tokens"]
    assert content["data"][0][1:] == ["cat", 5]


def test_mlflow_says_that_it_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'mlflow'")

    monkeypatch.setattr(loggers, "MLFlowLogger", missing)
    with pytest.raises(FewtokensError, match="logger=mlflow needs MLflow, which is not installed: pip install mlflow"):
        loggers.mlflow(str(tmp_path), "fewtokens")


def test_wandb_does_not_record_secrets_of_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    arguments = ["train.py", "seed=1", "+api_key=abc", "+logger.wandb.group=hf_0123456789", "+hf_token=hf_0123456789"]
    monkeypatch.setattr(sys, "argv", arguments)
    recorded = []
    monkeypatch.setattr(wandb, "init", lambda **settings: recorded.extend(sys.argv) or Run())
    _ = WandbRun(str(tmp_path), mode="offline").experiment
    assert recorded == ["train.py", "seed=1", "+api_key=***", "+logger.wandb.group=***", "+hf_token=***"]
    assert sys.argv == arguments
